"""Keys and values that a model computes for given texts, to fit maps on and to measure them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from roro_fast.engine.transfer import upload
from roro_fast.errors import CapacityError, DataError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch, infer
from roro_fast.ops.kv_project import unrotate

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Sheet:
    """Texts as a ragged batch in which text i has page i to itself; `size` is the page size, the longest text's."""

    texts: list[np.ndarray]
    size: int

    def pages(self, model: Decoder) -> torch.Tensor:
        c = model.config
        shape = len(self.texts), c.num_layers, 2, self.size, c.num_kv_heads, c.head_dim
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    def index(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slots, positions), [T] int64 each, of tokens [start, stop) of every text."""
        positions = [np.arange(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)]
        slots = [i * self.size + p for i, p in enumerate(positions)]
        return np.concatenate(slots), np.concatenate(positions)

    def run(self, model: Decoder, pages: torch.Tensor, start: np.ndarray) -> torch.Tensor:
        """Hidden states [T, H] of tokens [start, end) of every text, whose earlier keys and values are in `pages`."""
        stop = self.lengths
        slots, positions = self.index(start, stop)
        ids = np.concatenate([t[a:] for t, a in zip(self.texts, start.tolist(), strict=True)])
        cu = np.concatenate([[0], np.cumsum(stop - start)])
        table = np.arange(len(self.texts))[:, None]
        tokens, at, where, own, lens, offsets = upload((ids, positions, slots, table, stop, cu), model.device)
        return infer(model, PagedBatch(tokens, at, where, pages, own, lens, offsets))

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.texts], np.int64)


def sheets(model: Decoder, texts: Tokens, max_tokens: int = 8192) -> Iterator[Sheet]:
    """All texts in order, at most `max_tokens` tokens to a sheet (a longer text has one to itself).

    Raises DataError for an empty text or a strange id, CapacityError for a text beyond the model's context.
    """
    arrays = [np.asarray(t, np.int64) for t in texts]
    for i, t in enumerate(arrays):
        if not len(t) or t.min() < 0 or t.max() >= model.config.vocab_size:
            raise DataError(f"texts[{i}]: empty, or an id outside the vocabulary of {model.config.vocab_size}")
        if len(t) > model.config.max_position:
            raise CapacityError(f"texts[{i}]: {len(t)} tokens, the model takes {model.config.max_position}; cut it")
    begin = 0
    while begin < len(arrays):
        end, longest = begin, 0
        while end < len(arrays):
            longest = max(longest, len(arrays[end]))
            if end > begin and longest * (end + 1 - begin) > max_tokens:
                break
            end += 1
        yield Sheet(arrays[begin:end], max(len(t) for t in arrays[begin:end]))
        begin = end


class RecordedKV(NamedTuple):
    """Keys turned back to position 0 and values, [T, layers, Hkv * D], float32 at least; cu_seqlens [texts + 1]."""

    keys: torch.Tensor
    values: torch.Tensor
    cu_seqlens: torch.Tensor


@torch.inference_mode()
def record_kv(model: Decoder, texts: Tokens) -> RecordedKV:
    """What `model` keeps for `texts` (token ids), rounded as its pages round it."""
    kind = torch.promote_types(model.dtype, torch.float32)
    keys, values = [], []
    for sheet in sheets(model, texts):
        pages = sheet.pages(model)
        sheet.run(model, pages, np.zeros(len(sheet.texts), np.int64))
        at, positions = (torch.from_numpy(a).to(model.device) for a in sheet.index(sheet.lengths * 0, sheet.lengths))
        kv = pages[at // sheet.size, :, :, at % sheet.size].to(kind)  # [T, L, 2, H, D]
        turn = (t[positions][:, None, None].to(kind) for t in (model.cos, model.sin))
        keys.append(unrotate(kv[:, :, 0], *turn).flatten(2))
        values.append(kv[:, :, 1].flatten(2))
    lengths = torch.tensor([0, *(len(t) for t in texts)])
    if not keys:
        raise DataError("texts: none given; a map is fitted on what models compute for texts")
    return RecordedKV(torch.cat(keys), torch.cat(values), lengths.cumsum(0))
