"""Batches padded to few shapes, so that a forward captured once can run all that fall into its bucket.

A decode batch has a token a row and is padded by more such rows. A mixed batch, in which some rows bring several unseen
tokens, is padded to a number of rows and one of tokens; its padded tokens belong to sequences of their own, at least
one. What padding writes goes to a scratch page that no sequence holds, and what it samples is never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MIXED_TOKENS = (64, 96, 128, 192, 256, 384, 512)  # of a mixed batch; work of longer ones hides their launches
FEWEST_PAGES = 16  # a wider table costs nothing that a graph more would not


class StepRows(NamedTuple):
    """T tokens over N sequences of which M want their next token, in numpy: what a forward and its sampling need.

    ids, positions, slots [T], page_table [N, P], kv_lens [N], cu_seqlens [N + 1], wanted [M] (token numbers,
    ascending), top_k [M] int64; draws, temperature, top_p [M] float32; prefix as `shared_prefixes` gives it.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_seqlens: np.ndarray
    wanted: np.ndarray
    draws: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    prefix: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class Bucket(NamedTuple):
    """The shape of a graph: rows, tokens (0: a decode batch, one each), pages per row, whether prefixes are shared,
    whether top-k or top-p is on."""

    rows: int
    tokens: int
    pages: int
    shared: bool
    truncated: bool

    @property
    def sequences(self) -> int:
        return self.rows + bool(self.tokens)


class Shapes:
    """The buckets of batches of at most `max_rows` rows whose page tables are at most `max_pages` wide."""

    def __init__(self, page_size: int, max_rows: int, max_pages: int) -> None:
        self.page_size, self.max_rows, self.max_pages = page_size, max_rows, max_pages

    def fits(self, rows: int, tokens: int, wanted: int) -> bool:
        """Whether there is a bucket for such a batch."""
        return rows <= self.max_rows and (wanted == tokens or tokens <= MIXED_TOKENS[-1])

    def bucket(self, rows: StepRows) -> Bucket:
        """Rows of decode batches go up by powers of two to 8, then by eighths; those of mixed ones, where a row more
        costs next to nothing, from 16 by powers of four. Pages go up by powers of two."""
        n, tokens = len(rows.kv_lens), len(rows.ids)
        truncated = bool(rows.top_k.any() or (rows.top_p < 1).any())
        mixed = len(rows.wanted) < tokens
        padded_rows = self._mixed_rows(n) if mixed else self._decode_rows(n)
        padded_tokens = next(t for t in MIXED_TOKENS if t >= tokens) if mixed else 0
        pages = self._pages(rows.page_table.shape[1], padded_tokens)
        return Bucket(padded_rows, padded_tokens, pages, rows.prefix is not None, truncated)

    def up_to(self, context: int, shared: bool, truncated: bool) -> Iterator[Bucket]:
        """Every bucket of batches whose contexts are at most `context` tokens long, largest first."""
        used = range(1, -(-min(context, self.max_pages * self.page_size) // self.page_size) + 1)
        sizes = range(1, self.max_rows + 1)
        shapes = {(self._decode_rows(n), 0) for n in sizes}
        shapes |= {(self._mixed_rows(n), t) for n in sizes for t in MIXED_TOKENS if n < t}
        for rows, tokens in sorted(shapes, reverse=True):
            for pages in sorted({self._pages(u, tokens) for u in used}, reverse=True):
                yield Bucket(rows, tokens, pages, shared, truncated)

    def _decode_rows(self, n: int) -> int:
        step = max(1, 1 << max(0, (n - 1).bit_length() - 3))
        return min(1 << (n - 1).bit_length() if n <= 8 else -(-n // step) * step, self.max_rows)

    def _mixed_rows(self, n: int) -> int:
        power = max(4, (n - 1).bit_length())
        return min(1 << (power + power % 2), self.max_rows)

    def _pages(self, used: int, tokens: int) -> int:
        """At least as many as the tokens of a padded sequence would take."""
        width = min(max(1 << (used - 1).bit_length(), FEWEST_PAGES), self.max_pages)
        return max(width, -(-tokens // self.page_size))


def nothing() -> StepRows:
    """A batch without rows."""
    i, f = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return StepRows(i, i, i, np.zeros((0, 1), np.int64), i, np.zeros(1, np.int64), i, f, f, i, f)


def padded(rows: StepRows, bucket: Bucket, page_size: int, scratch: int) -> list[np.ndarray]:
    """The fields of `rows` in their order, in the shapes of the bucket; three more where it has shared prefixes."""
    n, used = len(rows.kv_lens), len(rows.ids)
    sequences, tokens = bucket.sequences, bucket.tokens or bucket.rows
    spare, unused = sequences - n, tokens - used
    table = np.full((sequences, bucket.pages), scratch, np.int64)
    table[:n, : rows.page_table.shape[1]] = rows.page_table
    ends = np.arange(1, spare + 1) * unused // max(spare, 1)  # spread over the padded sequences
    lens = np.maximum(np.diff(ends, prepend=0), 1)
    flat = [_fill(x, tokens, value) for x, value in zip(rows[:3], (0, 0, scratch * page_size), strict=True)]
    drawn = [_fill(x, bucket.rows, value) for x, value in zip(rows[6:11], (tokens - 1, 0, 0, 0, 1), strict=True)]
    shared: list[np.ndarray] = []
    if bucket.shared:
        members, first, lengths = rows.prefix or (lens[:0], np.zeros(1, np.int64), lens[:0])
        shared = all_in_groups(members, first, lengths, sequences)
    offsets = np.concatenate((rows.cu_seqlens, used + ends))
    return [*flat, table, np.concatenate((rows.kv_lens, lens)), offsets, *drawn, *shared]


def _fill(values: np.ndarray, size: int, value: float) -> np.ndarray:
    out = np.full(size, value, values.dtype)
    out[: len(values)] = values
    return out


def all_in_groups(members: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """The same prefix groups in arrays of fixed shape: [rows], [rows + 1], [rows].

    Rows outside every group go to one more, with an empty prefix; the rest of the groups are empty.
    """
    left = np.setdiff1d(np.arange(rows), members)
    ends = np.full(rows + 1, rows)
    ends[: len(offsets)] = offsets
    return [np.concatenate((members, left)), ends, np.pad(lengths, (0, rows - len(lengths)))]
