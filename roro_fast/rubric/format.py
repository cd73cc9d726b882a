"""The rubric text format: one criterion per line, strict enough that every failure has a name.

    - [Hard Rule] (timely escalation) the large model writes every swaps line
    - [Principle] (effective recovery) the small model takes over after line #3
    - [Principle] (efficient allocation) at most 2 switches

A rubric has 3 to 6 criteria. A Hard Rule weighs 3, a Principle 1. `parse` never raises: text that is not a rubric is an
`InvalidRubric` with a countable reason, so that a caller decides what it costs instead of reading a silent 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

HARD_RULE, PRINCIPLE = "Hard Rule", "Principle"
WEIGHTS = {HARD_RULE: 3.0, PRINCIPLE: 1.0}
ESCALATION, RECOVERY, ALLOCATION = "timely escalation", "effective recovery", "efficient allocation"
AXES = (ESCALATION, RECOVERY, ALLOCATION)
MIN_CRITERIA, MAX_CRITERIA = 3, 6
MAX_SENTENCE = 300  # characters
RESERVED = "Verdict:"  # the Judge's slot marker; a sentence that forges it is refused

_LINE = re.compile(r"- \[([^\]\n]*)\] \(([^)\n]*)\) (.*)")


@dataclass(frozen=True, slots=True)
class Criterion:
    """One sentence that is true or false about a trajectory. `tag` is a key of WEIGHTS, `axis` one of AXES."""

    tag: str
    axis: str
    sentence: str

    @property
    def weight(self) -> float:
        return WEIGHTS[self.tag]

    def __str__(self) -> str:
        return f"- [{self.tag}] ({self.axis}) {self.sentence}"


@dataclass(frozen=True, slots=True)
class Rubric:
    """A well-formed rubric. Build one through `make` or `parse`; both guarantee that `parse(str(rubric)) == rubric`."""

    criteria: tuple[Criterion, ...]

    @property
    def weights(self) -> list[float]:
        return [c.weight for c in self.criteria]

    def __len__(self) -> int:
        return len(self.criteria)

    def __str__(self) -> str:
        return "\n".join(str(c) for c in self.criteria)


@dataclass(frozen=True, slots=True)
class InvalidRubric:
    """Why a text is no rubric: `reason` is one of REASONS (countable), `detail` names the offending line."""

    reason: str
    detail: str = ""


REASONS = (
    "empty",
    "not a criterion line",
    "unknown tag",
    "unknown axis",
    "bad sentence",
    "repeated criterion",
    "too few criteria",
    "too many criteria",
    "not checkable",
    "unfinished",
)

# Says why a sentence cannot be judged for the query at hand, or "" when it can (see grammar.checker).
Check = Callable[[Criterion], str]


def make(
    criteria: tuple[Criterion, ...] | list[Criterion], check: Check | None = None, most: int = MAX_CRITERIA
) -> Rubric | InvalidRubric:
    """A rubric of these criteria, or why they are none. `most` may lower the upper limit of their number."""
    if not criteria:
        return InvalidRubric("empty")
    seen: set[str] = set()
    for c in criteria:
        if c.tag not in WEIGHTS:
            return InvalidRubric("unknown tag", f"[{c.tag}]; use [{HARD_RULE}] or [{PRINCIPLE}]")
        if c.axis not in AXES:
            return InvalidRubric("unknown axis", f"({c.axis}); use one of {', '.join(AXES)}")
        if bad := _sentence_fault(c.sentence):
            return InvalidRubric("bad sentence", bad)
        if c.sentence in seen:
            return InvalidRubric("repeated criterion", c.sentence)
        seen.add(c.sentence)
        if check is not None and (why := check(c)):
            return InvalidRubric("not checkable", f"{c.sentence}: {why}")
    if len(criteria) < MIN_CRITERIA:
        return InvalidRubric("too few criteria", f"{len(criteria)}; write {MIN_CRITERIA} to {most}")
    if len(criteria) > most:
        return InvalidRubric("too many criteria", f"{len(criteria)}; write {MIN_CRITERIA} to {most}")
    return Rubric(tuple(criteria))


def parse(text: str, check: Check | None = None, most: int = MAX_CRITERIA) -> Rubric | InvalidRubric:
    """Read a rubric. Blank space around the whole text is forgiven, nothing else is. Never raises."""
    body = text.strip()
    if not body:
        return InvalidRubric("empty")
    criteria = []
    for line in body.split("\n"):
        m = _LINE.fullmatch(line)
        if m is None:
            return InvalidRubric("not a criterion line", line[:MAX_SENTENCE])
        criteria.append(Criterion(*m.groups()))
    return make(criteria, check, most)


def _sentence_fault(sentence: str) -> str:
    if not sentence.strip():
        return "it is empty"
    if sentence != sentence.strip() or not sentence.isprintable():
        return f"{sentence[:60]!r} has blanks around it or unprintable characters"
    if len(sentence) > MAX_SENTENCE:
        return f"{sentence[:60]!r}... is longer than {MAX_SENTENCE} characters"
    if RESERVED in sentence:
        return f"{sentence[:60]!r} holds the reserved mark {RESERVED!r}"
    return ""
