"""Forwards, head and sampling included, replayed as CUDA graphs: one launch instead of hundreds.

Decode batches, and mixed ones up to `padding.MIXED_TOKENS[-1]` tokens, are padded to a bucket, see `padding`, and each
bucket has a graph of its own. A forward goes by nothing but the shapes of its inputs, so that all batches of a bucket
run the same kernels with the same grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from roro_fast.engine.padding import Bucket, Shapes, StepRows, nothing, padded
from roro_fast.engine.transfer import pack, unpack
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch, infer, logits
from roro_fast.ops import sample_step as sampling
from roro_fast.ops.paged_attention import PrefixGroups, wants_groups
from roro_fast.ops.registry import select
from roro_fast.ops.sample_step import SampledStep, sample_step

WARM_UP = 2  # eager runs before a capture: kernels are compiled and libraries initialised in them


def replayable(model: Decoder) -> bool:
    """Whether what serves the model can be captured: the references of attention and sampling look at the device."""
    at = model.device, model.dtype
    if model.device.type != "cuda":
        return True  # padded batches run eagerly
    windows = {0, *model.config.windows}
    return not any(wants_groups(*at, window=w) for w in windows) and select("sample_step", *at) != sampling.reference


class StepGraphs:
    """Graphs of one model, captured when a bucket is first needed, or before by `warm_up`.

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
        self.vocab_size, self.shapes, self.capture = vocab_size, Shapes(page_size, max_rows, max_pages), capture
        self._ready: dict[Bucket, tuple[torch.Tensor, Callable[[], tuple[torch.Tensor, SampledStep]]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._owners = [
            (m._parameters, name) for m in model.modules() for name, p in m._parameters.items() if p is not None
        ]
        self._seen = self._addresses()

    def look_at_weights(self) -> None:
        """Forget all graphs if a parameter lies elsewhere now: they would read where it was."""
        now = self._addresses()
        if now != self._seen:
            self._ready, self._seen = {}, now
            self._pool = torch.cuda.graph_pool_handle() if self.capture else None

    def _addresses(self) -> list[int]:
        return [parameters[name].data_ptr() for parameters, name in self._owners]  # type: ignore[union-attr]

    @torch.inference_mode()
    def run(self, rows: StepRows) -> tuple[torch.Tensor, SampledStep]:
        """(hidden [M, H], samples) of the wanted tokens. The next run overwrites them."""
        m = len(rows.wanted)
        hidden, sampled = self._run(rows, self.shapes.bucket(rows))
        return hidden[:m], SampledStep(*(x[:m] for x in sampled))

    @torch.inference_mode()
    def warm_up(self, context: int, *, shared: bool = False, truncated: bool = False) -> int:
        """Capture what batches with contexts of up to `context` tokens need; returns how many graphs there are now.

        shared: of sequences with a common prefix; truncated: of rows that draw by top-k or top-p.
        """
        for bucket in self.shapes.up_to(context, shared, truncated):
            if bucket not in self._ready:
                self._run(nothing(), bucket)
        return len(self._ready)

    def _run(self, rows: StepRows, bucket: Bucket) -> tuple[torch.Tensor, SampledStep]:
        arrays = padded(rows, bucket, self.page_size, self.scratch)
        packed = torch.from_numpy(pack(arrays))
        if bucket not in self._ready:
            self._ready[bucket] = self._prepare(bucket, packed.to(self.model.device), arrays)
        inputs, replay = self._ready[bucket]
        inputs.copy_(packed.pin_memory() if inputs.is_cuda else packed, non_blocking=True)
        return replay()

    def _prepare(
        self, bucket: Bucket, inputs: torch.Tensor, arrays: Sequence[np.ndarray]
    ) -> tuple[torch.Tensor, Callable[[], tuple[torch.Tensor, SampledStep]]]:
        ids, positions, slots, table, lens, cu, wanted, draws, heat, top_k, top_p, *shared = unpack(inputs, arrays)
        prefix = PrefixGroups(*shared) if shared else None
        batch = PagedBatch(ids, positions, slots, self.pages, table, lens, cu, prefix)
        limits = (top_k, top_p) if bucket.truncated else (None, None)

        def eager() -> tuple[torch.Tensor, SampledStep]:
            hidden = infer(self.model, batch)
            if bucket.tokens:  # of all, since `PagedBatch.wanted` has no room for padding: no token may be there twice
                hidden = hidden[wanted]
            return hidden, sample_step(logits(self.model, hidden)[:, : self.vocab_size], draws, heat, *limits)

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
