"""The script every engine follows: the same for all, forced lengths, and the least work that it takes."""

from __future__ import annotations

import itertools
import statistics

import pytest

from bench.e2e import workload
from bench.e2e.cells import Prompts, plain_cells, routed_cell, sweep_cells
from bench.e2e.pairs import ensure
from bench.e2e.workload import Sequence, Workload


def prompts(n: int, length: int = 10, first: int = 0) -> list[list[int]]:
    return [[first + i] * length for i in range(n)]


def routed(n: int = 8, **settings: object) -> Workload:
    defaults: dict[str, object] = {"new_tokens": 60, "switch": 0.4, "concurrency": n}
    return workload.routed("w", prompts(n), **(defaults | settings))  # type: ignore[arg-type]


def needed_by_hand(work: Workload) -> tuple[list[int], list[int]]:
    """Token by token: a model runs all it has not seen before it writes; what a group shares is run once."""
    tokens, pairs = [0] * work.num_models, [0] * work.num_models
    shared: set[tuple[int, int, int]] = set()
    for s in work.sequences:
        seen, length = [0] * work.num_models, len(s.prompt)
        for model, n in s.steps:
            for _ in range(n):
                for at in range(seen[model], length):
                    key = (s.group, model, at)
                    if at < len(s.prompt) - 1 and key in shared:
                        continue
                    shared.add(key)
                    tokens[model] += 1
                    pairs[model] += at + 1
                seen[model] = length
                length += 1
    return tokens, pairs


def test_plans_depend_on_the_seed_alone() -> None:
    a, b = routed(), workload.routed("w", prompts(8, first=50), new_tokens=60, switch=0.4, concurrency=8)
    assert [s.steps for s in a.sequences] == [s.steps for s in b.sequences]
    assert [s.steps for s in a.sequences] != [s.steps for s in routed(seed=1).sequences]
    assert a == routed() and Workload.from_dict(a.to_dict()) == a
    assert [s.steps for s in a.first(3).sequences] == [s.steps for s in a.sequences[:3]]


def test_rounds_differ_in_prompts_and_nothing_else() -> None:
    cell = routed_cell(Prompts(ensure("tiny")), concurrency=4, switch=0.5, prompt=30, new=40)
    one, two = cell.make(1), cell.make(2)
    assert [s.steps for s in one.sequences] == [s.steps for s in two.sequences]
    assert all(a.prompt != b.prompt for a, b in zip(one.sequences, two.sequences, strict=True))
    assert one == cell.make(1)


def test_no_two_cells_of_a_sweep_have_a_prompt_in_common() -> None:
    """Else a prefix cache that knows one from the cell before would be measured, not the workload."""
    prompts_ = Prompts(ensure("nano"))  # of a short text, unlike the tiny pair
    main = routed_cell(prompts_, concurrency=32, switch=0.2, prompt=100, new=20)
    heads: list[tuple[int, ...]] = []
    for cell in [main, *sweep_cells(prompts_, 20)]:
        for round_ in (0, 1, 2):
            made = cell.make(round_)
            heads += {(s.group, *s.prompt[:16]) for s in made.sequences}
    assert len({h[1:] for h in heads}) == len(heads)


@pytest.mark.parametrize("switch", [0.0, 0.2, 0.5, 1.0])
def test_switch_rate_and_lengths(switch: float) -> None:
    work = routed(400, switch=switch, new_tokens=100)
    assert all(s.new_tokens == 100 for s in work.sequences)
    for s in work.sequences:
        lengths = [n for _, n in s.steps]
        assert len(set(lengths[:-1])) <= 1 and lengths[-1] <= lengths[0]
    chances = sum(len(s.steps) - 1 for s in work.sequences)
    assert work.switches / chances == pytest.approx(switch, abs=0.03)
    shares = statistics.mean(s.steps[0][0] for s in work.sequences)
    assert shares == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("models", "group"), list(itertools.product([1, 2, 4], [1, 4])))
def test_least_work(models: int, group: int) -> None:
    rows = [[g] * 9 + [100 + i] for i in range(8) for g in [i // group]]
    work = workload.routed("w", rows, new_tokens=50, switch=0.5, concurrency=8, num_models=models, group=group)
    tokens, pairs = workload.needed(work)
    assert (tokens, pairs) == needed_by_hand(work)
    passes = workload.weight_passes(work)
    assert all(p <= t for p, t in zip(passes, tokens, strict=True))
    if models == 1:
        assert passes == [50]


def test_one_after_another_needs_more_passes() -> None:
    together = workload.weight_passes(routed(8))
    alone = workload.weight_passes(routed(8, concurrency=1))
    written = [sum(n for s in routed(8).sequences for m, n in s.steps if m == k) for k in range(2)]
    assert alone == written and all(a < b for a, b in zip(together, alone, strict=True))


def test_sizes() -> None:
    work = Workload("w", [Sequence([1] * 5, [(0, 3)], 0), Sequence([1] * 9, [(1, 2), (0, 2)], 1)], 1)
    assert (work.longest, work.kv_tokens, work.new_tokens, work.switches) == (13, 13, 7, 1)


def test_prompts_of_a_group_share_all_but_the_last_token() -> None:
    work = routed_cell(Prompts(ensure("nano")), concurrency=6, switch=0.2, prompt=40, new=20, group=3).make(1)
    rows = [s.prompt for s in work.sequences]
    assert {len(r) for r in rows} == {40} and len({tuple(r) for r in rows}) == 6
    heads = [tuple(r[:-1]) for r in rows]
    assert heads[0] == heads[1] == heads[2] != heads[3] == heads[4] == heads[5]


def test_plain_cells_repeat_only_the_warm_prompt() -> None:
    cells = {c.name: c for c in plain_cells(Prompts(ensure("tiny")), 2, 8)}
    assert all({m for s in c.make(1).sequences for m, _ in s.steps} == {1} for c in cells.values())
    warm, prefill = (cells[name].make(3).sequences[0] for name in ("warm", "prefill"))
    assert warm.prompt == prefill.prompt and (warm.new_tokens, prefill.new_tokens) == (20, 1)
    others = [
        tuple(s.prompt) for name, c in cells.items() if name != "warm" for r in (1, 2) for s in c.make(r).sequences
    ]
    assert len(others) == len(set(others))


def test_the_sweep_holds_what_is_promised() -> None:
    names = {c.name for c in sweep_cells(Prompts(ensure("tiny")), 96)}
    assert {"c1_s0.2_p100_n96_g1", "c128_s0.2_p100_n96_g1", "c32_s0_p100_n96_g1", "c32_s0.5_p100_n96_g1"} <= names
    assert {"c32_s0.2_p100_n96_g8", "c32_s0.2_p1000_n96_g1"} <= names
