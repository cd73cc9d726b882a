"""judge_score in C++ against the full-vocabulary route (all logits, softmax, pick the verdict words) and the reference.

python -m bench.ops.bench_judge_score [--seconds 1.5] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import functools

import torch

from bench.ops.harness import Case, arguments, copies_for, run
from roro_fast.ops.judge_score import judge_score
from tests.ops.cases import judge_score as cases

# verdict slots, width, vocabulary (None: no full-vocabulary peer)
SHAPES = [(18, 20, 100), (256, 576, 49152), (1024, 576, 49152), (1024, 4096, None)]


def full_vocabulary(c: cases.Case, head: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a language-model call gives: logits over everything, then the verdict words' share of the softmax."""
    p = torch.softmax((c.hidden[c.rows] @ head.T).float(), -1)[:, words]
    p = p / p.sum(-1, keepdim=True)
    value = c.criterion_weight * (p @ c.valence)
    mass = torch.segment_reduce(c.criterion_weight, "sum", offsets=c.offsets)
    return p, torch.segment_reduce(value, "sum", offsets=c.offsets) / mass.clamp_min(1e-9)


def case(slots: int, width: int, vocab: int | None, dtype: torch.dtype) -> Case:
    sizes, groups = [6] * (slots // 6) + [slots % 6], [slots // 6 + 1]
    size = slots * width * dtype.itemsize
    inputs = [cases.make(width, 2, sizes, groups, dtype, seed=i) for i in range(copies_for(2 * size))]
    at = lambda i: inputs[i % len(inputs)]  # noqa: E731
    variants = {
        "cpu": lambda i: judge_score(*at(i), impl="cpu"),
        "reference": lambda i: judge_score(*at(i), impl="reference"),
    }
    if vocab is not None:
        head = torch.randn(vocab, width).to(dtype)
        words = torch.tensor([vocab // 3, vocab // 2])
        for c in inputs:
            c.label_weight.copy_(head[words])
        variants["full vocabulary"] = lambda i: full_vocabulary(at(i), head, words)
    return Case(
        name=f"M={slots} H={width} V={vocab} {str(dtype).removeprefix('torch.')}",
        variants=variants,
        ours="cpu",
        bytes=size + 2 * width * dtype.itemsize,
        gate=lambda: [cases.check(c, judge_score(*c, impl="cpu"), dtype) for c in inputs[:2]],
        targets={"full vocabulary": 20.0} if vocab and vocab > 1000 else {},
        note=f"full-vocabulary logits take {slots * vocab * 4} bytes, ours {slots * 2 * 4}" if vocab else "",
    )


def main() -> None:
    args = arguments(__doc__)
    build = [functools.partial(case, *s, t) for s in SHAPES for t in (torch.float32, torch.bfloat16)]
    absent = {"cut-cross-entropy indexed dot": "needs a GPU", "Liger-Kernel": "needs a GPU"}
    run("judge_score", build, args, absent)


if __name__ == "__main__":
    main()
