"""The accuracy-versus-cost frontier of a router, batched over bootstrap replicates and seeds.

Choice of curve (ours, and the same for every arm): the operating points that no cheaper point equals or beats, joined
by straight lines. All-small and all-large always belong to the set because every router reaches them; a segment is
reached by tossing a coin between its two ends. The curve is flat from its last point to the cost of all-large. Unlike
the concave hull it shows a router that is worse than the coin toss between all-small and all-large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Frontier:
    """Vertices of a batch of frontiers: `x` (cost) and `y` (accuracy), both [..., M] and non-decreasing along M."""

    x: np.ndarray
    y: np.ndarray

    def mean(self) -> np.ndarray:
        """[...] mean accuracy over [all-small cost, all-large cost]; NaN where the two costs are equal."""
        dx = np.diff(self.x, axis=-1)
        total = (dx * (self.y[..., 1:] + self.y[..., :-1]) / 2).sum(-1)
        return _ratio(total, self.x[..., -1] - self.x[..., 0])

    def at(self, cost: np.ndarray | float) -> np.ndarray:
        """[..., G] accuracy at costs [G]; a cost below all-small reads NaN, one above all-large reads the end value."""
        g = np.atleast_1d(np.asarray(cost, dtype=np.float64))
        i = (self.x[..., None, :] <= g[:, None]).sum(-1) - 1
        j = np.minimum(i + 1, self.x.shape[-1] - 1)
        x0, y0 = _take(self.x, np.maximum(i, 0)), _take(self.y, np.maximum(i, 0))
        x1, y1 = _take(self.x, j), _take(self.y, j)
        w = np.clip(np.nan_to_num(_ratio(g - x0, x1 - x0)), 0.0, 1.0)
        return np.where(i < 0, np.nan, y0 + w * (y1 - y0))

    def reach(self, accuracy: np.ndarray) -> np.ndarray:
        """[...] least cost at which the frontier reaches `accuracy` [...]; NaN where it never does."""
        t = np.asarray(accuracy, dtype=np.float64)[..., None]
        hit = self.y >= t
        j = hit.argmax(-1)[..., None]
        i = np.maximum(j - 1, 0)
        x0, y0, x1, y1 = (_take(v, k) for k in (i, j) for v in (self.x, self.y))
        w = np.where(j == 0, 1.0, np.clip(np.nan_to_num(_ratio(t - y0, y1 - y0)), 0.0, 1.0))
        return np.where(hit.any(-1), (x0 + w * (x1 - x0))[..., 0], np.nan)


def pareto(
    cost: np.ndarray,
    accuracy: np.ndarray,
    small: tuple[np.ndarray, np.ndarray],
    large: tuple[np.ndarray, np.ndarray],
) -> Frontier:
    """Frontiers of points [..., P] with anchors (cost [...], accuracy [...]).

    A point dearer than all-large is of no use and is dropped; one cheaper than all-small is counted at its cost.
    """
    shape = np.broadcast_shapes(cost.shape[:-1], small[0].shape, large[0].shape)
    sc, sa, lc, la = (np.broadcast_to(v, shape)[..., None] for v in (*small, *large))
    points = (*shape, cost.shape[-1])
    c, a = np.broadcast_to(cost, points), np.broadcast_to(accuracy, points)
    keep = np.isfinite(c) & np.isfinite(a) & (c <= lc)
    c, a = np.where(keep, np.maximum(c, sc), sc), np.where(keep, a, sa)
    x, y = np.concatenate([sc, c, lc], -1), np.concatenate([sa, a, la], -1)
    order = np.lexsort((-y, x), axis=-1)  # of equal costs the best first, the rest are dominated
    return _climb(_take(x, order), _take(y, order), lc)


def _climb(x: np.ndarray, y: np.ndarray, end: np.ndarray) -> Frontier:
    """Replace each dominated vertex of a cost-sorted chain by the last undominated one and close the chain at `end`."""
    best = np.maximum.accumulate(y, axis=-1)
    new = np.ones(y.shape, dtype=bool)
    new[..., 1:] = y[..., 1:] > best[..., :-1]
    last = np.maximum.accumulate(np.where(new, np.arange(y.shape[-1]), 0), axis=-1)
    x, y = _take(x, last), _take(y, last)
    return Frontier(np.concatenate([x, end], -1), np.concatenate([y, y[..., -1:]], -1))


def _take(v: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(v, index, -1)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is not positive."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(np.shape(a), np.shape(b)), np.nan), where=b > 0)
