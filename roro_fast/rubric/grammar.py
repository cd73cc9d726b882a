"""The closed grammar of checkable criteria used by the nano tier, and each sentence's truth on a trajectory.

    the large model writes line #3            the large model writes every swaps line
    the small model takes over after line #3  the large model writes at most 2 lines       at most 2 switches

Truth depends only on the query's text and on which model wrote which step: what a Judge can see. It serves the Judge's
warm-up and the seed rubrics; it never looks at outcomes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from roro_fast.rubric.format import ALLOCATION, ESCALATION, RECOVERY, Check, Criterion
from roro_fast.rubric.render import View
from roro_fast.tasks.ledger import parse_query
from roro_fast.tasks.worked import plan_of

KINDS = ("writes line", "writes every", "takes over after", "writes at most", "switches")
OPERATIONS = {"+": "adds", "-": "subtracts", "*": "multiplies"}
NUMBERED = tuple(k for k in KINDS if k != "writes every")


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence of the grammar. `label` names the model ("" for "switches"), `verb` is set for "writes every"."""

    kind: str
    label: str = ""
    number: int = 0
    verb: str = ""

    def __str__(self) -> str:
        if self.kind == "switches":
            return f"at most {self.number} switches"
        head = f"the {self.label} model {self.kind}"
        if self.kind == "writes every":
            return f"{head} {self.verb} line"
        if self.kind == "writes at most":
            return f"{head} {self.number} lines"
        return f"{head} #{self.number}" if self.kind == "writes line" else f"{head} line #{self.number}"


_SENTENCE = re.compile(
    r"at most (?P<switches>\d+) switches"
    r"|the (?P<label>[A-Za-z]+) model (?:writes line #(?P<line>\d+)|writes every (?P<verb>[A-Za-z]+) line"
    r"|takes over after line #(?P<after>\d+)|writes at most (?P<most>\d+) lines)"
)


def read(sentence: str) -> Claim | None:
    """The claim a sentence makes, None if it is not of the grammar. Inverse of `str`."""
    m = _SENTENCE.fullmatch(sentence)
    if m is None:
        return None
    g = m.groupdict()
    label = g["label"] or ""
    if g["verb"] is not None:
        return Claim("writes every", label, verb=g["verb"])
    kind, digits = next((kind, g[kind.split()[-1]]) for kind in NUMBERED if g[kind.split()[-1]] is not None)
    claim = Claim(kind, label, int(digits))
    return claim if str(claim) == sentence else None  # "007" is no number of the grammar


@lru_cache(maxsize=4096)
def verbs_of(prompt: str) -> tuple[str, ...]:
    """What each line does, as far as the query tells: the verb of each line of a ledger query, the operation of each
    step that a question of the smol tier's arithmetic asks for; empty for any other text."""
    try:
        return tuple(line.verb for line in parse_query(prompt)[1])
    except (ValueError, KeyError):
        return tuple(OPERATIONS[o.sign] for o in plan_of(prompt))


def axis_of(claim: Claim, labels: Sequence[str]) -> str:
    """A larger model's writing is escalation; limits, and what the smallest one writes, are allocation."""
    if claim.kind == "takes over after":
        return RECOVERY if claim.label == labels[0] else ESCALATION
    if claim.kind in ("switches", "writes at most") or claim.label == labels[0]:
        return ALLOCATION
    return ESCALATION


def criterion(claim: Claim, tag: str, labels: Sequence[str]) -> Criterion:
    return Criterion(tag, axis_of(claim, labels), str(claim))


def truth(claim: Claim, view: View, verbs: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether the claim holds. A line that was never written makes a claim about it false.

    "takes over after line #k": another model wrote line k and this one wrote line k + 1.
    """
    models = view.models
    if claim.kind == "switches":
        return view.switches <= claim.number
    model = labels.index(claim.label)
    k = claim.number
    if claim.kind == "writes at most":
        return sum(m == model for m in models) <= k
    if claim.kind == "writes line":
        return 1 <= k <= len(models) and models[k - 1] == model
    if claim.kind == "takes over after":
        return 1 <= k < len(models) and models[k - 1] != model and models[k] == model
    lines = [i for i, v in enumerate(verbs) if v == claim.verb]
    return all(i < len(models) and models[i] == model for i in lines)


def claims(verbs: Sequence[str], labels: Sequence[str], steps: int | None = None) -> list[Claim]:
    """Every claim the grammar can make about a query with these verbs; its steps are its lines and the total.

    Queries of other tasks have no verbs; their number of `steps` must be given.
    """
    steps = len(verbs) + 1 if steps is None else steps
    small, large = labels[0], labels[-1]
    out = [Claim("writes line", x, k) for x in labels for k in range(1, steps + 1)]
    out += [Claim("writes every", x, verb=v) for x in labels for v in dict.fromkeys(verbs)]
    out += [Claim("takes over after", x, k) for x in (small, large) for k in range(1, steps)]
    out += [Claim("writes at most", x, n) for x in labels[1:] for n in range(steps)]
    return out + [Claim("switches", number=n) for n in range(steps - 1)]


def checker(prompt: str, labels: Sequence[str]) -> Check:
    """Refuses sentences outside the grammar or not about this query (`format.parse(text, check)`)."""
    verbs = verbs_of(prompt)
    possible = {str(c) for c in claims(verbs, labels)}

    def check(c: Criterion) -> str:
        claim = read(c.sentence)
        if claim is None or claim.label not in ("", *labels) or (verbs and c.sentence not in possible):
            return "not a sentence of the grammar about this query"
        right = axis_of(claim, labels)
        return "" if c.axis == right else f"belongs to the axis ({right})"

    return check
