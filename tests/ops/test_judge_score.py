"""judge_score against a per-slot float64 loop, its gradients, empty sizes and determinism."""

from __future__ import annotations

import math

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.ops.judge_score import EPS, judge_score

VALENCE = torch.tensor([1.0, -1.0])


def case(sizes: list[int], hidden: int = 16, labels: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    slots = sum(sizes)
    h = torch.randn(3 * slots + 1, hidden, generator=g).to(dtype)
    rows = torch.randint(0, len(h), (slots,), generator=g)
    w = torch.randn(labels, hidden, generator=g).to(dtype)
    c = torch.randint(0, 4, (slots,), generator=g).float()
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return h, rows, w, c, offsets


def by_hand(h, rows, w, c, offsets, valence):
    """The docstring's formula, one slot at a time, in Python floats."""
    probs, scores = [], []
    for r in rows.tolist():
        logits = [sum(a * b for a, b in zip(h[r].tolist(), row.tolist(), strict=True)) for row in w]
        e = [math.exp(x - max(logits)) for x in logits]
        probs.append([x / sum(e) for x in e])
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        mass = sum(c[a:b].tolist())
        total = sum(
            c[m].item() * sum(v * p for v, p in zip(valence.tolist(), probs[m], strict=True)) for m in range(a, b)
        )
        scores.append(total / mass if mass else 0.0)
    return torch.tensor(probs), torch.tensor(scores)


@pytest.mark.parametrize("sizes", [[3], [6, 3, 4], [0, 5, 0], [1] * 40])
@pytest.mark.parametrize("labels", [2, 3])
def test_matches_the_formula(sizes, labels):
    args = case(sizes, labels=labels)
    valence = torch.tensor([1.0, -1.0, 0.25][:labels])
    out = judge_score(*args, valence)
    probs, scores = by_hand(*args, valence)
    torch.testing.assert_close(out.probs, probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.scores, scores, atol=1e-5, rtol=1e-5)
    assert out.advantages is None and out.scores.abs().max() <= 1


def test_zero_weight_scores_zero():
    h, rows, w, c, offsets = case([3, 2])
    out = judge_score(h, rows, w, c.zero_(), offsets, VALENCE)
    assert out.scores.tolist() == [0.0, 0.0]


def test_bf16_inputs_accumulate_in_fp32():
    h, rows, w, c, offsets = case([4, 5], hidden=256, dtype=torch.bfloat16)
    out = judge_score(h, rows, w, c, offsets, VALENCE)
    assert out.probs.dtype == torch.float32
    exact, _ = by_hand(h.double(), rows, w.double(), c, offsets, VALENCE)
    torch.testing.assert_close(out.probs, exact, atol=1e-5, rtol=1e-4)


def test_advantages_are_normalised_within_groups():
    args = case([3] * 7)
    groups = torch.tensor([0, 3, 3, 7])  # sizes 3, 0, 4
    out = judge_score(*args, VALENCE, groups)
    for a, b in ((0, 3), (3, 7)):
        s = out.scores[a:b]
        want = (s - s.mean()) / (s.std(unbiased=False) + EPS)
        torch.testing.assert_close(out.advantages[a:b], want, atol=1e-5, rtol=1e-5)


def test_gradients_match_finite_differences():
    h, rows, w, c, offsets = case([3, 2], hidden=4)
    h.requires_grad_()
    w.requires_grad_()
    direction = torch.tensor([1.0, -2.0])
    (judge_score(h, rows, w, c, offsets, VALENCE).scores @ direction).backward()
    step = 1e-2
    for x in (h, w):
        for i in range(x.numel()):
            with torch.no_grad():
                up, down = x.detach().clone(), x.detach().clone()
                up.view(-1)[i] += step
                down.view(-1)[i] -= step
                f = [
                    judge_score(y if x is h else h, rows, y if x is w else w, c, offsets, VALENCE).scores @ direction
                    for y in (up, down)
                ]
            assert x.grad.view(-1)[i].item() == pytest.approx(((f[0] - f[1]) / (2 * step)).item(), abs=2e-3)


@pytest.mark.parametrize("segments", [0, 3])
def test_empty(segments):
    offsets = torch.zeros(segments + 1, dtype=torch.int64)
    none = torch.zeros(0)
    out = judge_score(
        torch.zeros(0, 8), none.long(), torch.zeros(2, 8), none, offsets, VALENCE, torch.tensor([0, segments])
    )
    assert out.probs.shape == (0, 2) and out.scores.tolist() == [0.0] * segments


def test_repeats_bit_for_bit():
    args = case([5] * 50, hidden=96)
    first = judge_score(*args, VALENCE)
    assert all(torch.equal(judge_score(*args, VALENCE).scores, first.scores) for _ in range(50))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ConfigError, match="judge_score.*nowhere"):
        judge_score(*case([3]), VALENCE, impl="nowhere")
