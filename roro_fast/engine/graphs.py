"""Decode forwards, head and sampling included, replayed as CUDA graphs: one launch instead of hundreds.

A graph has fixed shapes, so decode batches are padded to a bucket of rows and of pages per row. What a padded row
writes goes to a scratch page that no sequence holds, and its sample is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from roro_fast.engine.transfer import pack, unpack
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch, infer, logits
from roro_fast.ops.paged_attention import PrefixGroups
from roro_fast.ops.sample_step import SampledStep, sample_step

WARM_UP = 2  # eager runs before a capture: kernels are compiled and libraries initialised in them


class DecodeRows(NamedTuple):
    """One new token for each of N sequences, in numpy: what a decode forward and its sampling need.

    ids, positions, slots, kv_lens, top_k [N] and page_table [N, P] int64; draws, temperature, top_p [N] float32;
    prefix as `shared_prefixes` gives it.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    draws: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    prefix: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class Bucket(NamedTuple):
    """The shape of a graph: rows, pages per row, whether prefixes are shared, whether top-k or top-p is on."""

    rows: int
    pages: int
    shared: bool
    truncated: bool


class DecodeGraphs:
    """Graphs of one model, captured when a bucket is first needed.

    pages: the model's KV pages; scratch: a page of it that no sequence holds; capture False runs the padded batches
    eagerly, which is what a device without graphs can do.
    """

    def __init__(
        self,
        model: Decoder,
        pages: torch.Tensor,
        page_size: int,
        scratch: int,
        vocab_size: int,
        *,
        max_rows: int,
        max_pages: int,
        capture: bool = True,
    ) -> None:
        self.model, self.pages, self.page_size, self.scratch = model, pages, page_size, scratch
        self.vocab_size, self.max_rows, self.max_pages, self.capture = vocab_size, max_rows, max_pages, capture
        self._ready: dict[Bucket, tuple[torch.Tensor, Callable[[], tuple[torch.Tensor, SampledStep]]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def bucket(self, rows: DecodeRows) -> Bucket:
        """Rows go up by powers of two to 8, then by eighths; pages by powers of two."""
        n, used = len(rows.ids), rows.page_table.shape[1]
        step = max(1, 1 << max(0, (n - 1).bit_length() - 3))
        padded = 1 << (n - 1).bit_length() if n <= 8 else -(-n // step) * step
        truncated = bool(rows.top_k.any() or (rows.top_p < 1).any())
        pages = min(1 << (used - 1).bit_length(), self.max_pages)
        return Bucket(min(padded, self.max_rows), pages, rows.prefix is not None, truncated)

    @torch.inference_mode()
    def run(self, rows: DecodeRows) -> tuple[torch.Tensor, SampledStep]:
        """(hidden [N, H], samples) of the batch. They are overwritten by the next run of the same bucket."""
        n, bucket = len(rows.ids), self.bucket(rows)
        arrays = self._padded(rows, bucket)
        packed = torch.from_numpy(pack(arrays))
        if bucket not in self._ready:
            self._ready[bucket] = self._prepare(bucket, packed.to(self.model.device), arrays)
        inputs, replay = self._ready[bucket]
        inputs.copy_(packed.pin_memory() if inputs.is_cuda else packed, non_blocking=True)
        hidden, sampled = replay()
        return hidden[:n], SampledStep(*(x[:n] for x in sampled))

    def _padded(self, rows: DecodeRows, bucket: Bucket) -> list[np.ndarray]:
        n, extra = len(rows.ids), bucket.rows - len(rows.ids)
        table = np.full((bucket.rows, bucket.pages), self.scratch, np.int64)
        table[:n, : rows.page_table.shape[1]] = rows.page_table
        fill = {"slots": self.scratch * self.page_size, "kv_lens": 1, "top_p": 1.0}
        columns = [
            np.pad(getattr(rows, name), (0, extra), constant_values=fill.get(name, 0))
            for name in ("ids", "positions", "slots", "kv_lens", "draws", "temperature", "top_k", "top_p")
        ]
        shared = [] if rows.prefix is None else all_in_groups(*rows.prefix, bucket.rows)
        return [table, np.arange(bucket.rows + 1), *columns, *shared]

    def _prepare(
        self, bucket: Bucket, inputs: torch.Tensor, arrays: list[np.ndarray]
    ) -> tuple[torch.Tensor, Callable[[], tuple[torch.Tensor, SampledStep]]]:
        table, cu, ids, positions, slots, lens, draws, temperature, top_k, top_p, *shared = unpack(inputs, arrays)
        prefix = PrefixGroups(*shared) if shared else None
        batch = PagedBatch(ids, positions, slots, self.pages, table, lens, cu, prefix)
        limits = (top_k, top_p) if bucket.truncated else (None, None)

        def eager() -> tuple[torch.Tensor, SampledStep]:
            hidden = infer(self.model, batch)
            return hidden, sample_step(logits(self.model, hidden)[:, : self.vocab_size], draws, temperature, *limits)

        if not self.capture:
            return inputs, eager
        for _ in range(WARM_UP):
            eager()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            out = eager()

        def replay() -> tuple[torch.Tensor, SampledStep]:
            graph.replay()
            return out

        return inputs, replay


def all_in_groups(members: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """The same prefix groups in arrays of fixed shape: [rows], [rows + 1], [rows].

    Rows outside every group go to one more, with an empty prefix; the rest of the groups are empty.
    """
    left = np.setdiff1d(np.arange(rows), members)
    padded = np.full(rows + 1, rows)
    padded[: len(offsets)] = offsets
    return [np.concatenate((members, left)), padded, np.pad(lengths, (0, rows - len(lengths)))]
