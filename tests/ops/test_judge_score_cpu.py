"""judge_score in C++ on every instruction set: the shared cases, bad input, gradients left to the reference."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError, RoroError
from roro_fast.ops import native
from roro_fast.ops.judge_score import cpu, judge_score
from tests.ops import concurrency
from tests.ops.cases import judge_score as cases

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(isa: str, size: tuple, dtype: torch.dtype) -> None:
    c = cases.make(*size, dtype)
    cases.check(c, judge_score(*c, impl="cpu"), dtype)
    mixed = c._replace(label_weight=c.label_weight.float())
    cases.check(mixed, judge_score(*mixed, impl="cpu"), dtype)


@settings(max_examples=60)
@given(
    st.integers(0, 80), st.integers(1, 9), st.lists(st.integers(0, 9), max_size=9), st.booleans(),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(width: int, labels: int, slots: list[int], grouped: bool, dtype: torch.dtype, seed: int) -> None:
    if not native.available():
        return
    groups = [len(slots) // 2, len(slots) - len(slots) // 2] if grouped else None
    c = cases.make(max(width, 1), labels, slots, groups, dtype, seed=seed)
    cases.check(c, judge_score(*c, impl="cpu"), dtype)


def test_a_slot_alone_equals_the_slot_in_a_batch(isa: str) -> None:
    c = cases.make(333, 3, [2] * 20, None)
    wide = torch.full((len(c.hidden), 400), float("nan"))
    wide[:, 5:338] = c.hidden
    whole = judge_score(*c._replace(hidden=wide[:, 5:338]), impl="cpu")  # rows lie apart, and are not aligned
    for s in range(0, 20, 3):
        part = slice(2 * s, 2 * s + 2)
        one = c._replace(rows=c.rows[part], criterion_weight=c.criterion_weight[part], offsets=torch.tensor([0, 2]))
        got = judge_score(*one, impl="cpu")
        assert torch.equal(got.probs, whole.probs[part]) and got.scores[0] == whole.scores[s]


def test_zero_weight_scores_zero(isa: str) -> None:
    c = cases.make(8, 2, [3, 2, 0], [3])
    got = judge_score(*c._replace(criterion_weight=torch.zeros(5)), impl="cpu")
    assert got.scores.tolist() == got.advantages.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.usefixtures("kernels")
def test_gradients_are_left_to_the_reference() -> None:
    c = cases.make(8, 2, [3, 2], None)
    c.hidden.requires_grad_()
    assert judge_score(*c).scores.requires_grad
    with pytest.raises(ConfigError, match="judge_score:cpu .* has no gradients"):
        judge_score(*c, impl="cpu")
    with torch.no_grad():
        torch.testing.assert_close(judge_score(*c, impl="cpu").scores, judge_score(*c, impl="reference").scores)


BAD = {
    "hidden: float16 but float32 or bfloat16": lambda c: c._replace(hidden=c.hidden.half()),
    "hidden: elements of the last dimension are apart": lambda c: c._replace(hidden=c.hidden.T.contiguous().T),
    "label_weight: shape [2, 9] but [any, 8]": lambda c: c._replace(label_weight=torch.zeros(2, 9)),
    "label_weight: 65 verdict words; the kernel takes 1 to 64": lambda c: c._replace(label_weight=torch.zeros(65, 8)),
    "label_weight: 0 verdict words": lambda c: c._replace(label_weight=torch.zeros(0, 8)),
    "rows: row 13 at 0, but hidden has 13": lambda c: c._replace(rows=torch.full((5,), 13)),
    "rows: row -1 at 0": lambda c: c._replace(rows=torch.full((5,), -1)),
    "rows: int32 but int64": lambda c: c._replace(rows=c.rows.int()),
    "criterion_weight: shape [4] but [5]": lambda c: c._replace(criterion_weight=torch.ones(4)),
    "criterion_weight: -1 at 0": lambda c: c._replace(criterion_weight=-torch.ones(5)),
    "criterion_weight: nan at 0": lambda c: c._replace(criterion_weight=torch.full((5,), float("nan"))),
    "valence: shape [3] but [2]": lambda c: c._replace(valence=torch.ones(3)),
    "offsets: must run from 0 to 5": lambda c: c._replace(offsets=torch.tensor([0, 4])),
    "offsets: descends at 2": lambda c: c._replace(offsets=torch.tensor([0, 5, 3, 5])),
    "group_offsets: must run from 0 to 2": lambda c: c._replace(group_offsets=torch.tensor([0, 1])),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises(RoroError, match=re.escape(message)):
        cpu(*BAD[message](cases.make(8, 2, [3, 2], [2])))


@pytest.mark.usefixtures("kernels")
def test_registered_op_passes_opcheck() -> None:
    torch.library.opcheck(native.op("judge_score"), (*cases.make(8, 2, [3, 2], [2]), 1e-6))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    c = cases.make(576, 2, [6] * 60, [30, 30])
    concurrency.check(lambda: judge_score(*c, impl="cpu"))
