"""Score label tokens at chosen positions of many prompts: ragged forwards in which shared beginnings are read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from roro_fast.engine.packing import pack
from roro_fast.engine.transfer import upload
from roro_fast.errors import CapacityError, ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import infer


@torch.inference_mode()
def states(
    model: Decoder, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final-normed hidden states at positions `rows[i]` of each prompt, left on the model's device.

    Returns hidden [*, H] in the model's dtype and index [M] int64 into it, M positions in the order of prompts. A
    forward computes at most `max_tokens` tokens; several forwards keep only the rows that were asked for.
    """
    ends = np.cumsum([0, *map(len, rows)])
    index = np.empty(int(ends[-1]), np.int64)
    asked = [i for i, r in enumerate(rows) if r]
    kept: list[torch.Tensor] = []
    base = 0
    batches = list(pack([prompts[i][: max(rows[i]) + 1] for i in asked], max_tokens))
    for batch in batches:
        with torch.cuda.device_of(model.embed.weight):  # kernels are launched on the current one
            hidden = infer(model, batch.on(model))
        for j, at in batch.at.items():
            i = asked[j]
            index[ends[i] : ends[i + 1]] = at[rows[i]] + base
        if len(batches) > 1:
            mine = np.concatenate([np.arange(ends[asked[j]], ends[asked[j] + 1]) for j in batch.at])
            hidden = hidden[upload((index[mine] - base,), model.device)[0]]
            index[mine] = np.arange(base, base + len(mine))
        kept.append(hidden)
        base += len(hidden)
    if not kept:
        kept = [torch.empty(0, model.config.hidden_size, dtype=model.dtype, device=model.device)]
    return kept[0] if len(kept) == 1 else torch.cat(kept), upload((index,), model.device)[0]


@torch.inference_mode()
def score_prompts(
    model: Decoder, prompts: list[list[int]], rows: list[list[int]], label_ids: list[int], max_tokens: int
) -> list[torch.Tensor]:
    """See StepEngine.score."""
    _check(model, prompts, rows, label_ids)
    hidden, index = states(model, prompts, rows, max_tokens)
    head = model.head.weight[torch.tensor(label_ids, device=model.device)]
    probs = torch.softmax(F.linear(hidden[index], head).float(), -1).cpu()
    return list(probs.split([len(r) for r in rows]))


def _check(model: Decoder, prompts: list[list[int]], rows: list[list[int]], label_ids: list[int]) -> None:
    context, vocab = model.config.max_position, model.config.vocab_size
    if len(rows) != len(prompts):
        raise ConfigError(f"rows: {len(rows)} lists of positions for {len(prompts)} prompts; give one per prompt")
    if not label_ids or not all(0 <= x < vocab for x in label_ids):
        raise ConfigError(f"label_ids: {label_ids} must be one or more ids below the vocabulary size {vocab}")
    for i, (p, r) in enumerate(zip(prompts, rows, strict=True)):
        if not p:
            raise ConfigError(f"prompts[{i}]: empty; a prompt needs at least one token")
        if len(p) > context:
            raise CapacityError(f"prompts[{i}]: {len(p)} tokens do not fit the context of {context}; shorten it")
        if max(p) >= vocab or min(p) < 0:
            raise ConfigError(f"prompts[{i}]: an id is outside the vocabulary of {vocab}")
        if any(not 0 <= x < len(p) for x in r):
            raise ConfigError(f"rows[{i}]: a position is outside the prompt of {len(p)} tokens")
