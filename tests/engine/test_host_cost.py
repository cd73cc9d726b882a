"""No per-sequence Python in the token loop: an iteration makes as many calls for many rows as for one."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from roro_fast.engine import Request, StepEngine
from roro_fast.models import nano
from roro_fast.ops import native
from tests.engine import pairs

ROWS = 48


def calls(engine: StepEngine, rows: int, alike: bool, iterations: int = 8) -> Counter[str]:
    """Functions called in so many iterations of plain decoding; rows `alike` share their prompt's pages."""
    for seed in range(rows):
        ledger = f"Ada's ledger of coins starts at {10 if alike else 10 + seed} #0 earns 5 #1 scales 7 #2 Total?\n\n"
        prompt = engine.tokenizer(ledger if alike else f"{10 + seed} {ledger}")["input_ids"]
        engine.add(Request(prompt, seed=seed, max_new_tokens=40, temperature=1.0, ignore_eos=True, model=1))
    for _ in range(3):  # admission, the prompt, one more
        engine.step()
    seen: Counter[str] = Counter()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            seen[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            seen[getattr(arg, "__qualname__", str(arg))] += 1

    sys.setprofile(note)
    try:
        for _ in range(iterations):
            assert engine.step(same_weights=True) == []
    finally:
        sys.setprofile(None)
    while engine.has_work:
        engine.step()
    return seen


@pytest.mark.skipif(not native.available(), reason="needs the C++ extension")
@pytest.mark.parametrize(("alike", "rows"), [(False, 1), (True, 2)])
def test_an_iterations_calls_do_not_grow_with_its_rows(alike, rows) -> None:
    engine = StepEngine(nano.load_pair(), pairs.tokenizer(), delimiter="\n\n", max_num_seqs=ROWS)
    few, many = calls(engine, rows, alike), calls(engine, ROWS, alike)
    assert few.total() > 100
    grown = {name: (few[name], n) for name, n in many.items() if n > few[name]}
    assert many.total() <= 1.1 * few.total(), f"called more often with {ROWS} rows than with {rows}: {grown}"
