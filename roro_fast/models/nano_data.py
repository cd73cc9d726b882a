"""Training batches for the nano pair: ledger problems of the train split, sampled and tokenised with numpy.

A batch is a pure function of (seed, step), so a resumed run sees exactly the data an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from roro_fast.models.nano_tokenizer import vocabulary
from roro_fast.tasks.ledger import DELIMITER, ITEMS, KINDS, MAX_LINES, MIN_LINES, MODULUS, NAMES, split_of

IGNORE = -100
_ID = {token: i for i, token in enumerate(vocabulary())}
_NUMBER = np.array([_ID[f" {i}"] for i in range(MODULUS)])
_MARK = np.array([_ID[f" #{i}"] for i in range(MAX_LINES + 1)])
_VERB = np.array([[_ID[f" {v}"] for v in k.verbs] for k in KINDS])
_NAME = np.array([_ID[n] for n in NAMES])
_ITEM = np.array([_ID[f" {i}"] for i in ITEMS])
_HAS_OPERAND = np.array([k.operands is not None for k in KINDS])
_LOW = np.array([k.operands[0] if k.operands else 0 for k in KINDS])
_HIGH = np.array([k.operands[1] if k.operands else 0 for k in KINDS])
_WEIGHT = np.array([k.weight for k in KINDS]) / sum(k.weight for k in KINDS)
_PAD, _EOS = _ID["<pad>"], _ID["<eos>"]
ABSENT = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch, all int64.

    `ids` [B, S], right-padded; `targets` [B, S]: the next token where it belongs to the completion, else IGNORE;
    `results` [B, n]: the column whose target is the result of each line; `kinds` [B, n]: index into KINDS.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    results: torch.Tensor
    kinds: torch.Tensor


def sample_kinds(rng: np.random.Generator, size: int, lines: int, split: str = "train") -> np.ndarray:
    """[size, lines] indices into KINDS, drawn with the task's weights among the kind sequences of `split`."""
    rows: list[np.ndarray] = []
    while len(rows) < size:
        for row in rng.choice(len(KINDS), size=(size, lines), p=_WEIGHT):
            if split_of([KINDS[i].name for i in row]) == split:
                rows.append(row)
    return np.stack(rows[:size])


def make_batch(
    seed: int,
    step: int,
    size: int,
    split: str = "train",
    narrow: Mapping[str, int] | None = None,
    noise: float = 0.0,
) -> Batch:
    """`size` problems that share one line count, so that padding is a few tokens only.

    `narrow` holds the largest operand of some kinds of line, by name, where the corpus does not cover the task.
    `noise` is the share of lines that write any number as their result; the next line goes on from it.
    """
    rng = np.random.default_rng([seed, step])
    high = np.array([min(h, (narrow or {}).get(k.name, h)) for k, h in zip(KINDS, _HIGH.tolist(), strict=True)])
    n = int(rng.integers(MIN_LINES, MAX_LINES + 1))
    kinds = sample_kinds(rng, size, n, split)
    verbs = _VERB[kinds, rng.integers(0, _VERB.shape[1], size=kinds.shape)]
    operands = rng.integers(_LOW[kinds], high[kinds] + 1)
    values = np.empty((size, n + 1), dtype=np.int64)
    values[:, 0] = rng.integers(0, MODULUS, size=size)
    for i in range(n):
        for k, kind in enumerate(KINDS):
            after = kind.apply(values[:, i], operands[:, i])  # type: ignore[arg-type]  # the lambdas broadcast
            values[:, i + 1] = np.where(kinds[:, i] == k, after, values[:, i + 1])
        if noise > 0:
            slips = rng.random(size) < noise
            values[:, i + 1] = np.where(slips, rng.integers(0, MODULUS, size=size), values[:, i + 1])

    names, items = _NAME[rng.integers(0, len(_NAME), size)], _ITEM[rng.integers(0, len(_ITEM), size)]
    operand_ids = np.where(_HAS_OPERAND[kinds], _NUMBER[operands], ABSENT)
    return _assemble(names, items, kinds, verbs, operand_ids, values)


def _assemble(
    names: np.ndarray, items: np.ndarray, kinds: np.ndarray, verbs: np.ndarray, operands: np.ndarray, values: np.ndarray
) -> Batch:
    size, n = kinds.shape

    def constant(*tokens: str) -> np.ndarray:
        return np.tile([_ID[t] for t in tokens], (size, 1))

    head = [names[:, None], constant("'s", " ledger", " of"), items[:, None], constant(" starts", " at")]
    head += [_NUMBER[values[:, :1]], constant(" #0")]
    for i in range(n):
        head += [verbs[:, i : i + 1], operands[:, i : i + 1], np.full((size, 1), _MARK[i + 1])]
    head.append(constant(" Total", "?", DELIMITER))
    body, result_columns = [], []
    prompt = width = sum(x.shape[1] for x in head)
    for i in range(n):
        body += [verbs[:, i : i + 1], operands[:, i : i + 1], constant(":"), _NUMBER[values[:, i : i + 1]]]
        body += [constant(" gives"), _NUMBER[values[:, i + 1 : i + 2]]]
        body += [np.full((size, 1), _MARK[i + 1]), constant(DELIMITER)]
        result_columns.append(width + 5)
        width += 8
    body += [constant(" Total"), _NUMBER[values[:, n:]], np.full((size, 1), _EOS)]
    table = np.concatenate(head + body, axis=1)  # [B, W], ABSENT where a line has no operand

    present = table != ABSENT
    column = np.cumsum(present, axis=1) - 1
    rows = np.broadcast_to(np.arange(size)[:, None], table.shape)
    length = int(present.sum(1).max())
    full = np.full((size, length), _PAD)
    completion = np.zeros((size, length), dtype=bool)
    full[rows[present], column[present]] = table[present]
    in_body = np.broadcast_to(np.arange(table.shape[1]) >= prompt, table.shape)
    completion[rows[present], column[present]] = in_body[present]
    targets = np.where(completion[:, 1:], full[:, 1:], IGNORE)
    results = column[:, result_columns] - 1
    return Batch(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (full[:, :-1], targets, results, kinds)))
