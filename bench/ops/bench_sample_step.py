"""sample_step in C++ against the torch chain (softmax, sample, log-prob, entropy) and the reference.

python -m bench.ops.bench_sample_step [--seconds 1.5] [--threads 1] [--no-compile] [--out FILE]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.ops.harness import Case, arguments, copies_for, run
from roro_fast.ops.sample_step import sample_step
from tests.ops.cases import sample_step as cases

# rows, vocabulary, mode: the nano engine's, and those of the issue
SHAPES = [(n, 100, m) for n in (1, 32, 256) for m in ("greedy", "plain", "both")]
SHAPES += [(n, v, m) for v in (49152, 152064) for n in (1, 16) for m in ("greedy", "plain", "top_k", "top_p", "both")]


def chain(logits: torch.Tensor, uniforms: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sampling at a temperature with log-prob, entropy and confidence, without truncation: no sort."""
    x = logits.float()
    logp = torch.log_softmax(x, -1)
    p = logp.exp()
    hot = torch.softmax(x / temperature[:, None], -1).cumsum(-1)
    token = torch.searchsorted(hot, uniforms[:, None]).clamp_max(x.shape[-1] - 1)
    return token, logp.gather(-1, token), -(p * logp).sum(-1), p.amax(-1)


def case(n: int, vocab: int, mode: str, dtype: torch.dtype, compiled: Callable[..., Any] | None) -> Case:
    size = n * vocab * dtype.itemsize
    inputs = [cases.make(n, vocab, mode, dtype, seed=i) for i in range(min(8, copies_for(size)))]
    at = lambda i: inputs[i % len(inputs)]  # noqa: E731
    variants = {
        "cpu": lambda i: sample_step(*at(i), impl="cpu"),
        "reference": lambda i: sample_step(*at(i), impl="reference"),
    }
    if mode == "plain":
        variants["torch chain"] = lambda i: chain(*at(i)[:3])
        if compiled is not None:
            variants["torch.compile"] = lambda i: compiled(*at(i)[:3])
    peer = "torch chain" if mode == "plain" else "reference"
    return Case(
        name=f"N={n} V={vocab} {mode} {str(dtype).removeprefix('torch.')}",
        variants=variants,
        ours="cpu",
        bytes=size,
        gate=lambda: [cases.check(c, sample_step(*c, impl="cpu"), dtype) for c in inputs[:2]],
        targets={peer: 3.0} if vocab > 1000 else {},
    )


def main() -> None:
    args = arguments(__doc__)
    compiled = None if args.no_compile else torch.compile(chain, dynamic=True)
    build = [functools.partial(case, *s, torch.float32, compiled) for s in SHAPES]
    build += [functools.partial(case, *s, torch.bfloat16, compiled) for s in SHAPES if s[0] == 16 and s[2] == "plain"]
    run("sample_step", build, args, {"torch.compile": "--no-compile"} if args.no_compile else {})


if __name__ == "__main__":
    main()
