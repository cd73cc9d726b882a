"""The built-in task: keep a running total modulo 100 through a list of ledger lines of uneven difficulty.

A query reads

    Ada's ledger of coins starts at 37 #0 earns 5 #1 banks 48 #2 swaps #3 Total?

and its reference answer writes one step per line, each closed by a blank line:

    earns 5: 37 gives 42 #1
    banks 48: 42 gives 90 #2
    swaps: 90 gives 9 #3
    Total 9

The kind of a line (add one digit, multiply, swap digits, ...) decides how hard its step is, and the kinds are visible
in the query, so which step needs the large model is a learnable, query-specific fact. Splits are disjoint by the
template parameter that matters, the sequence of kinds: `split_of` hashes it, so a kind sequence seen in training never
appears in calibration or test.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from roro_fast.errors import ConfigError, DataError
from roro_fast.tasks.base import SPLITS, Outcome, Query

MODULUS = 100
DELIMITER = "\n\n"
MIN_LINES, MAX_LINES = 4, 8


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of line: its verbs (synonyms), operand range (None: no operand), sampling weight and arithmetic."""

    name: str
    verbs: tuple[str, ...]
    operands: tuple[int, int] | None
    weight: float
    apply: Callable[[int, int], int]


KINDS: tuple[Kind, ...] = (
    Kind("add1", ("earns", "finds"), (1, 9), 3.0, lambda x, d: (x + d) % MODULUS),
    Kind("sub1", ("pays", "loses"), (1, 9), 3.0, lambda x, d: (x - d) % MODULUS),
    Kind("add2", ("banks", "inherits"), (10, 99), 1.0, lambda x, d: (x + d) % MODULUS),
    Kind("sub2", ("spends", "donates"), (10, 99), 1.0, lambda x, d: (x - d) % MODULUS),
    Kind("mul", ("repeats", "scales"), (2, 9), 1.0, lambda x, d: (x * d) % MODULUS),
    Kind("swap", ("swaps", "reverses"), None, 1.0, lambda x, _: (x % 10) * 10 + x // 10),
)
KIND_OF_NAME = {k.name: k for k in KINDS}
KIND_OF_VERB = {v: k for k in KINDS for v in k.verbs}
NAMES = (
    "Ada", "Bo", "Cleo", "Dev", "Eli", "Fay", "Gus", "Hana", "Ivo", "Jun", "Kai", "Lena", "Mia", "Noor", "Otto", "Pia",
)  # fmt: skip
ITEMS = ("coins", "stamps", "beads", "cards", "shells", "tokens", "marbles", "tickets")

_LINE = re.compile(r" ([a-z]+)(?: (\d+))? #(\d+)")
_START = re.compile(r" starts at (\d+) #0")
_NUMBER = "(0|[1-9][0-9]{0,3})"  # as the task writes numbers, and never so long that reading one is slow
_STEP = re.compile(rf" ?([a-z]+(?: [0-9]+)?): {_NUMBER} gives {_NUMBER} #{_NUMBER}")
_TOTAL = re.compile(rf" ?Total {_NUMBER}")


@dataclass(frozen=True, slots=True)
class Line:
    """One ledger line: kind, the verb that names it and its operand (0 when the kind has none)."""

    kind: Kind
    verb: str
    operand: int

    def __str__(self) -> str:
        return self.verb if self.kind.operands is None else f"{self.verb} {self.operand}"


def split_of(kinds: Sequence[str]) -> str:
    """Split of a kind sequence: 70 % train, 10 % calibrate, 20 % test by a stable hash."""
    bucket = hashlib.sha256(" ".join(kinds).encode()).digest()[0] % 10
    return "train" if bucket < 7 else "calibrate" if bucket < 8 else "test"


def render_query(name: str, item: str, start: int, lines: Sequence[Line]) -> str:
    body = "".join(f" {line} #{i}" for i, line in enumerate(lines, 1))
    return f"{name}'s ledger of {item} starts at {start} #0{body} Total?{DELIMITER}"


def render_steps(start: int, lines: Sequence[Line]) -> list[str]:
    """Reference solution, one text per step; all but the last end with the delimiter."""
    steps, value = [], start
    for i, line in enumerate(lines, 1):
        after = line.kind.apply(value, line.operand)
        steps.append(f" {line}: {value} gives {after} #{i}{DELIMITER}")
        value = after
    return [*steps, f" Total {value}"]


def parse_query(prompt: str) -> tuple[int, list[Line]]:
    """(start, lines) of a prompt made by `render_query`."""
    start = _START.search(prompt)
    if start is None:
        raise DataError(f"query.prompt: not a ledger prompt: {prompt[:60]!r}; make one with render_query")
    lines = []
    for verb, operand, _ in _LINE.findall(prompt[start.end() :]):
        if verb not in KIND_OF_VERB:
            raise DataError(f"query.prompt: unknown ledger verb {verb!r}; choose one of {', '.join(KIND_OF_VERB)}")
        lines.append(Line(KIND_OF_VERB[verb], verb, int(operand or 0)))
    return int(start.group(1)), lines


def sample_problem(rng: random.Random, kinds: Sequence[Kind] = KINDS) -> tuple[str, str, int, list[Line]]:
    """Draw (name, item, start, lines); the split follows from the kinds drawn."""
    n = rng.randint(MIN_LINES, MAX_LINES)
    drawn = rng.choices(kinds, weights=[k.weight for k in kinds], k=n)
    lines = [Line(k, rng.choice(k.verbs), rng.randint(*k.operands) if k.operands else 0) for k in drawn]
    return rng.choice(NAMES), rng.choice(ITEMS), rng.randrange(MODULUS), lines


class Ledger:
    """The `ledger` task. Verification is exact text matching on parsed steps, local to each step.

    A step is right when verb, operand and line number are those of its line, its input is the value the previous step
    wrote, and its result follows; the answer is right when the written total equals the true one. `kinds` names the
    kinds of line that queries are made of, default all: for studies of transfer from some kinds to others.
    """

    name = "ledger"

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        for k in kinds:
            if k not in KIND_OF_NAME:
                raise ConfigError(f"task.name: {k!r} is no kind of ledger line; choose of {', '.join(KIND_OF_NAME)}")
        self.kinds = tuple(k for k in KINDS if not kinds or k.name in kinds)

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        if split not in SPLITS:
            raise ConfigError(f"task.split: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        n = 1000 if n is None else n
        some = "" if self.kinds == KINDS else "+".join(k.name for k in self.kinds)
        rng = random.Random(f"ledger/{split}/{seed}/{some}" if some else f"ledger/{split}/{seed}")
        drawn = f"ledger-{split}-{seed}" + (f"-{some}" if some else "")
        out: list[Query] = []
        while len(out) < n:
            name, item, start, lines = sample_problem(rng, self.kinds)
            if split_of([x.kind.name for x in lines]) != split:
                continue
            steps = render_steps(start, lines)
            out.append(
                Query(
                    id=f"{drawn}-{len(out)}",
                    prompt=render_query(name, item, start, lines),
                    answer=steps[-1].split()[-1],
                    task=self.name,
                    split=split,
                    meta={"kinds": [x.kind.name for x in lines]},
                )
            )
        return out

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        start, lines = parse_query(query.prompt)
        flags, value = [], start
        predicted: str | None = None
        for i, text in enumerate(steps):
            text = text.removesuffix(DELIMITER)
            if i < len(lines):
                right, value = _check_line(text, lines[i], i + 1, value)
            else:
                total = _TOTAL.fullmatch(text)
                right = total is not None and i == len(lines) and int(total.group(1)) == value
                predicted = total.group(1) if total else predicted
            flags.append(right)
        error = "" if predicted is not None else "no answer"
        return Outcome(predicted == query.answer, predicted, tuple(flags), error)


def _check_line(text: str, line: Line, number: int, value: int) -> tuple[bool, int]:
    """(is the step right given the running value, the value it wrote)."""
    m = _STEP.fullmatch(text)
    if m is None:
        return False, value
    before, after, index = int(m.group(2)), int(m.group(3)), int(m.group(4))
    same = m.group(1) == str(line) and before == value and index == number
    return same and after == line.kind.apply(value, line.operand), after
