"""The shipped pair has the shape that the ledger task asks for, on a sample and as the engine decodes it."""

from __future__ import annotations

import pytest

from roro_fast.eval.check_nano import measure, step_errors
from roro_fast.models import nano
from roro_fast.models.decoder import Decoder
from roro_fast.tasks.ledger import Ledger
from tests.eval.samples import trajectory


@pytest.fixture(scope="module")
def pair() -> list[Decoder]:
    return nano.load_pair()


def test_required_shape_on_a_sample(pair: list[Decoder]) -> None:
    """Bounds widened for 100 queries; `python -m roro_fast.eval.check_nano` measures the real ones."""
    figures = measure(pair, Ledger().queries("test", 100, seed=7))
    acc = figures["accuracy"]
    assert acc["large"] >= 0.88
    assert 0.2 <= acc["small"] <= 0.75
    assert acc["oracle"] >= 0.95 * acc["large"]
    assert 0 < figures["oracle_flops_share"] <= 0.5
    assert figures["oracle_flops_share"] < figures["oracle_flops_share_with_drafts"]
    assert figures["parameters"][1] >= 7 * figures["parameters"][0]


def test_a_pair_of_the_wrong_shape_fails(pair: list[Decoder]) -> None:
    small, large = pair
    figures = measure([large, large], Ledger().queries("test", 30))
    assert not figures["checks"]["small accuracy in 30-65 %"][1]
    assert not figures["checks"]["oracle FLOPs <= 45 % of large"][1]


def test_step_errors_are_counted_by_the_kind_of_their_line() -> None:
    queries = Ledger().queries("test", 30, seed=3)
    runs = [trajectory(q, "x", [0] * (len(q.meta["kinds"]) + 1)) for q in queries]
    for q, t in zip(queries, runs, strict=True):
        t.step_correct = [False] + [True] * len(q.meta["kinds"])
    firsts = [q.meta["kinds"][0] for q in queries]
    for kind, (rate, count) in step_errors(queries, runs).items():
        assert rate * count == pytest.approx(firsts.count(kind))
