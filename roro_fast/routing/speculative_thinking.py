"""Speculative Thinking (arXiv 2504.12329): cue words at the start of a thought hand it over to the large model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

import torch

from roro_fast.config import require
from roro_fast.engine.policy import BoundaryBatch
from roro_fast.routing.threshold import ScoreThreshold

REFLECTION = ("wait", "alternatively", "hold on", "another")
VERIFICATION = ("verify", "think again", "recap", "check")
AFFIRMATION = ("yeah", "yes", "final answer", "confident")
CUES: Mapping[str, float] = dict.fromkeys((*REFLECTION, *VERIFICATION, *AFFIRMATION), 1.0)
_WORD = re.compile(r"[^\W\d_]+")


def opening(text: str, window: int) -> str:
    """The first `window` words of a step, lower case, between spaces; digits and signs left out."""
    return f" {' '.join(_WORD.findall(text.lower())[:window])} "


def fit_cues(drafts: Iterable[tuple[str, bool]], window: int = 20) -> dict[str, float]:
    """Risk of each opening word: (wrong drafts holding it + 1) / (drafts holding it + 2)."""
    seen: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for text, right in drafts:
        words = set(opening(text, window).split())
        seen.update(words)
        wrong.update(words if not right else ())
    return {w: (wrong[w] + 1) / (n + 2) for w, n in sorted(seen.items())}


class SpeculativeThinking(ScoreThreshold):
    """Rewrite a draft that opens with a cue, and hand over `handover` steps in a row; score = 1 - greatest cue risk.

    The paper's lists (default `cues`, risk 1 each) fire on reasoning models' self-talk. Where a task's answers have
    none, `fit_cues` gives risks of the words they do have. Ours: hand-over counts steps, not the paper's 20 or 125
    tokens, and nothing is put into the large model's mouth after many negations, since the engine never writes text.
    """

    name = "speculative_thinking"

    def __init__(
        self, cues: Mapping[str, float] = CUES, threshold: float = 0.5, *, window: int = 20, handover: int = 1
    ) -> None:
        super().__init__(threshold, "regenerate")
        require(window >= 1 and handover >= 1, f"{self.name}.window, handover", f"{window}, {handover}; use 1 or more")
        self.cues, self.window, self.handover = dict(cues), window, handover

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        rows = zip(batch.prefix, batch.tags, strict=True)
        return torch.tensor([self._score(prefix()[-1], tag["actions"]) for prefix, tag in rows])

    def _score(self, draft: str, actions: Sequence[int]) -> float:
        run = sum(1 for _ in takewhile(bool, reversed(actions)))
        if run % self.handover:  # a hand-over is under way
            return 0.0
        text = opening(draft, self.window)
        return 1.0 - max((risk for cue, risk in self.cues.items() if f" {cue} " in text), default=0.0)
