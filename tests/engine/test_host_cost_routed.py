"""The host's work for routed sequences: one call of the policy for all at a boundary, nothing for those between."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch

from roro_fast.engine import BoundaryBatch, Decisions, Request, StepEngine
from roro_fast.models import nano
from roro_fast.ops import native
from tests.engine import pairs

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the C++ extension")

ROWS = 48
CAP = 9  # tokens of a step of the rows that come to a boundary
CALLS_PER_BOUNDARY = {"next": 42, "regenerate": 57}  # Python and C calls a row at a boundary; 28 and 38 on Python 3.11
KINDS = [("next", False), ("next", True), ("regenerate", False), ("regenerate", True)]


class Alternating:
    """Another action at every other step, decided without a look at single rows."""

    name = "alternating"

    def __init__(self, action_space: str, needs_scout: bool) -> None:
        self.action_space, self.needs_scout = action_space, needs_scout
        self.asked: list[int] = []

    def decide(self, batch: BoundaryBatch) -> Decisions:
        self.asked.append(len(batch))
        actions = batch.step_index % 2
        probs = torch.nn.functional.one_hot(actions, batch.num_models).float()
        return Decisions(actions, torch.zeros(len(batch)), probs)


def iterations(kind: tuple[str, bool], rows: int, short: int, n: int) -> list[tuple[int, list[int]]]:
    """(calls, rows of each question to the policy) of n iterations, when `short` rows have steps of CAP tokens and the
    others are in one long step."""
    engine = StepEngine(nano.load_pair(), pairs.tokenizer(), delimiter="\n\n", max_num_seqs=ROWS)
    policy = Alternating(*kind)
    for i in range(rows):
        prompt = engine.tokenizer(f"{10 + i} Ada's ledger of coins starts at {10 + i} #0 earns 5 #1 Total?\n\n")
        cap = CAP if i < short else 0
        settings: dict[str, Any] = {"max_new_tokens": 64, "max_step_tokens": cap, "ignore_eos": True}
        engine.add(Request(prompt["input_ids"], seed=i, temperature=1.0, **settings), policy)
    for _ in range(4):  # admission, the first question, the prompt, one more
        engine.step()
    calls, seen = 0, []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for _ in range(n):
        policy.asked.clear()
        calls = 0
        sys.setprofile(note)
        try:
            assert engine.step(same_weights=True) == []
        finally:
            sys.setprofile(None)
        seen.append((calls, list(policy.asked)))
    for rid in engine.slots.request_id[engine.slots.request_id >= 0].tolist():
        engine.abort(rid)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_between_boundaries_calls_do_not_grow_with_the_rows(kind: tuple[str, bool]) -> None:
    few, many = iterations(kind, 1, 0, 8), iterations(kind, ROWS, 0, 8)
    assert not any(asked for _, asked in few + many)
    assert 8 * 20 < sum(c for c, _ in many) <= 1.1 * sum(c for c, _ in few), (few, many)


@pytest.mark.parametrize("kind", KINDS)
def test_a_boundary_costs_a_constant_for_each_row_that_is_at_it(kind: tuple[str, bool]) -> None:
    """Four boundaries of 2 and of 26 rows: the same questions, and so many more calls for 24 rows at 4 boundaries."""
    few, more = (iterations(kind, ROWS, short, 4 * CAP) for short in (2, 26))
    asked = [[n for _, asked in seen for n in asked] for seen in (few, more)]
    assert len(asked[0]) >= 3 and set(asked[0]) == {2}, "one call of decide for all rows at a boundary"
    assert asked[1] == [26] * len(asked[0])
    assert all(len(questions) <= 1 for _, questions in few + more)
    grown = sum(c for c, _ in more) - sum(c for c, _ in few)
    assert grown <= CALLS_PER_BOUNDARY[kind[0]] * 24 * len(asked[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_at_no_boundary_add_nothing_to_those_that_are(kind: tuple[str, bool]) -> None:
    few, many = iterations(kind, 3, 2, 4 * CAP), iterations(kind, ROWS, 2, 4 * CAP)  # both models have work in both
    assert [asked for _, asked in few] == [asked for _, asked in many] and any(asked for _, asked in few)
    assert all(b <= 1.05 * a for (a, _), (b, _) in zip(few, many, strict=True)), (few, many)
