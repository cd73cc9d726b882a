"""Score label tokens at chosen positions of many prompts: the Judge's one forward pass."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from roro_fast.errors import CapacityError, ConfigError
from roro_fast.models.decoder import Decoder


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that each right-padded rectangle holds at most `max_tokens` tokens, longest first."""
    out: list[list[int]] = []
    for i in np.argsort([-n for n in lengths], kind="stable").tolist():
        if not out or (len(out[-1]) + 1) * lengths[out[-1][0]] > max_tokens:
            out.append([])
        out[-1].append(i)
    return out


@torch.inference_mode()
def score_prompts(
    model: Decoder, prompts: list[list[int]], rows: list[list[int]], label_ids: list[int], max_tokens: int
) -> list[torch.Tensor]:
    """See StepEngine.score."""
    _check(model, prompts, rows, label_ids)
    head = model.head.weight[torch.tensor(label_ids, device=model.device)]
    out: list[torch.Tensor] = [torch.empty(0, len(label_ids))] * len(prompts)
    asked = [i for i, r in enumerate(rows) if r]
    for batch in batches([len(prompts[i]) for i in asked], max_tokens):
        group = [asked[i] for i in batch]
        width = len(prompts[group[0]])
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        for j, i in enumerate(group):
            ids[j, : len(prompts[i])] = torch.tensor(prompts[i])
        hidden = model.dense(ids.to(model.device))
        b, t = torch.tensor([(j, x) for j, i in enumerate(group) for x in rows[i]], device=model.device).T
        probs = torch.softmax(F.linear(hidden[b, t], head).float(), -1).cpu()
        for i, part in zip(group, probs.split([len(rows[i]) for i in group]), strict=True):
            out[i] = part
    return out


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
