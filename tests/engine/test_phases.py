"""Every phase of an iteration is a range of its own, whoever serves the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from roro_fast import profiling
from tests.engine import pairs
from tests.engine.pairs import Drawn, requests, run

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RORO_PROFILE", "times")
    profiling.mark.cache_clear()
    yield
    profiling.mark.cache_clear()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rollout_opens_the_range_of_every_phase(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_times", {})
    run(pairs.engine(pairs.pool(2), max_num_seqs=4, overlap=overlap), requests(6), Drawn("regenerate", True))
    spent = profiling.seconds()
    forwards = {f"{kind}/{m}" for kind in ("forward", "catch-up") for m in (0, 1)}
    assert set(spent) == forwards | {"admit", "schedule", "sample", "route", "record", "finish"}
    assert all(seconds > 0 for seconds in spent.values())
    assert spent["sample"] < sum(spent[name] for name in forwards)


def test_layers_that_all_models_share_have_ranges_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_times", {})
    run(pairs.engine(pairs.family("prefix"), max_num_seqs=4), requests(6), Drawn("next"))
    assert {"forward/shared", "catch-up/shared"} <= {name for name, seconds in profiling.seconds().items() if seconds}
