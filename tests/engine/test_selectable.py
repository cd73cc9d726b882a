"""The exactness contract on everything that a CPU's engine can be told to use: instruction sets, hosts, bfloat16."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from roro_fast.engine import Request, batching, pages
from roro_fast.models.decoder import Decoder
from roro_fast.ops import native
from tests.engine import pairs
from tests.engine.pairs import Drawn, audit, engine, requests, run
from tests.engine.test_exactness import mixed

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the C++ extension")
ISAS = native.usable_isas() if native.available() else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(pairs, "DTYPE", torch.float32)
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


def half() -> list[Decoder]:
    return [copy.deepcopy(pairs.model_pair(i)[1]).bfloat16() for i in range(3)]


def check_alone(models: list[Decoder], rows: list[Request], space: str) -> None:
    """Answers, steps and their statistics to the bit, in a batch, alone, and in another order and page size."""
    together = run(engine(models, max_num_seqs=16), rows, Drawn(space, True))
    assert {m for t in together.values() for m in t.models} == {0, 1, 2}
    one = engine(models, max_num_seqs=1)
    others = [{k: v for r in rows for k, v in run(one, [r], Drawn(space, True)).items()}]
    others.append(run(engine(models, max_num_seqs=5, page_size=4), rows[::-1], Drawn(space, True)))
    for got in others:
        for i, t in together.items():
            assert got[i].token_ids == t.token_ids and got[i].steps == t.steps, i


@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_every_instruction_set_is_exact(isa: str, space: str) -> None:
    assert native.isa() == isa
    e = engine(pairs.pool(3), page_size=4)
    for t in run(e, requests(6), Drawn(space, True)).values():
        audit(e, t, greedy=True)
    check_alone(pairs.pool(3), mixed(6, max_new_tokens=20), space)


@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_bfloat16_is_the_same_to_the_bit_in_any_batch(isa: str, space: str) -> None:
    assert native.isa() == isa
    check_alone(half(), mixed(6, max_new_tokens=20), space)


@pytest.mark.parametrize("host", ["python", "native"])
def test_every_host_is_exact(host: str) -> None:
    """In a process of its own, for the choice is made when the package is imported."""
    if host == "native" and not pages.HAVE_NATIVE:
        pytest.skip("roro_fast._host is not built here")
    ran = subprocess.run(
        [sys.executable, "-c", "from tests.engine.test_selectable import by_host; by_host()"],
        env=os.environ | {"RORO_HOST": host},
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == str(host == "python")


def by_host() -> None:
    """Exactness under the RORO_HOST of this process; prints whether Python serves."""
    torch.set_num_threads(1)
    pairs.DTYPE = torch.float32
    e = engine(pairs.pool(3), page_size=4)
    for t in run(e, requests(6), Drawn("regenerate", True)).values():
        audit(e, t, greedy=True)
    check_alone(pairs.pool(3), mixed(6, max_new_tokens=20), "regenerate")
    print(isinstance(e.forward.batcher, batching.PythonBatcher))
