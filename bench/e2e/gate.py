"""Is what an engine wrote what the models say? Checked against Hugging Face in fp32 before any time is printed.

Every token is scored by its writer's fp32 forward over the whole text so far. A correct greedy engine picks the best
token, or, computing in fewer bits, one that rounding could have put first: its logit may fall short of the best by
twice the largest error that Hugging Face's own forward in the engine's dtype makes on the same text.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.e2e.pairs import Pair
from bench.e2e.workload import Sequence, Workload

TOP = 64  # candidates of a position among which rounding may choose
SLACK = 1e-3


class Gate:
    """Reference models in fp32 and in the dtype under test."""

    def __init__(self, pair: Pair, dtype: str, device: str, threads: int) -> None:
        from bench.peers import hf
        from bench.peers.base import Pool

        self.device = device
        pool = Pool([str(p) for p in pair.paths], [], pair.random, "float32", device, threads)
        self.exact = hf.load_models(pool)
        pool.dtype = dtype
        self.same = self.exact if dtype == "float32" else hf.load_models(pool)
        self.tolerance = SLACK
        self.naive_mean = 0.0

    @torch.inference_mode()
    def calibrate(self, work: Workload, tokens: list[list[int]]) -> dict[str, float]:
        """Measure the rounding of the reference in the dtype under test on some texts; sets what `check` allows."""
        if self.same is not self.exact:
            errors, short = [], []
            for s, new in zip(work.sequences, tokens, strict=True):
                for model, at in spans(s):
                    exact = self._logits(self.exact[model], s.prompt + new, at)
                    same = self._logits(self.same[model], s.prompt + new, at)
                    top = exact.topk(min(TOP, exact.shape[1]), 1)
                    errors.append((same.gather(1, top.indices) - top.values).abs().max().item())
                    short.append(top.values[:, 0] - exact.gather(1, same.argmax(1, keepdim=True))[:, 0])
            self.tolerance = 2 * max(errors) + SLACK
            self.naive_mean = torch.cat(short).mean().item()
        return {"tolerance": self.tolerance, "naive_mean_shortfall": self.naive_mean}

    @torch.inference_mode()
    def check(self, work: Workload, tokens: list[list[int]]) -> dict[str, Any]:
        """How far an engine's tokens fall short; "ok" when never by more than rounding explains, nor more often."""
        gaps = []
        for s, new in zip(work.sequences, tokens, strict=True):
            if len(new) != s.new_tokens:
                return {"ok": False, "why": f"{len(new)} tokens, {s.new_tokens} were forced"}
            for model, at in spans(s):
                logits = self._logits(self.exact[model], s.prompt + new, at)
                chosen = torch.tensor([new[i - len(s.prompt) + 1] for i in at], device=logits.device)
                gaps.append(logits.amax(1) - logits.gather(1, chosen[:, None])[:, 0])
        gap = torch.cat(gaps)
        worst, mean = gap.max().item(), gap.mean().item()
        ok = worst <= self.tolerance and mean <= 3 * self.naive_mean + SLACK
        return {
            "ok": ok,
            "why": "" if ok else f"shortfall {worst:.3f} at worst, {mean:.5f} on average",
            "tokens": int(gap.numel()),
            "equal_to_fp32": round(float((gap == 0).float().mean()), 4),
            "worst_shortfall": round(worst, 4),
            "mean_shortfall": round(mean, 6),
        }

    def _logits(self, model: Any, ids: list[int], at: list[int]) -> torch.Tensor:
        """[len(at), V] float32 next-token logits at positions `at` of one cold prefill."""
        index = torch.tensor(at, device=self.device)
        return model(torch.tensor([ids], device=self.device), logits_to_keep=index).logits[0].float()


def spans(s: Sequence) -> list[tuple[int, list[int]]]:
    """(model, positions whose next token it wrote) of a sequence; one entry per model that wrote."""
    out: dict[int, list[int]] = {}
    at = len(s.prompt) - 1
    for model, n in s.steps:
        out.setdefault(model, []).extend(range(at, at + n))
        at += n
    return sorted(out.items())
