"""`roro project` on the packaged pair, and a pool that uses what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from roro_fast.cli import app
from roro_fast.config_io import load_config
from roro_fast.engine import Request, StepEngine
from roro_fast.engine.projection import KVProjection, load_projections
from roro_fast.errors import ConfigError
from roro_fast.models import nano
from roro_fast.routing import RandomRouter
from roro_fast.train.setup import Workbench

FIT = ["projection.texts=40", "projection.held_out=15", "projection.sources=2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("project") / "map"
    command = ["project", "--source", "large", "--target", "small", "--out", str(out), "projection.max_kl=5", *FIT]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "next-token KL, mean" in done.output and "projection.max_kl=5" in done.output
    return out


def test_the_command_writes_a_gated_map(saved: Path) -> None:
    p = KVProjection.load(saved)
    assert p.gate is not None and 0 < p.gate.kl_mean < 5 and p.gate.bound == 5 and 0.5 < p.gate.top1 < 1
    assert p.fit["texts"] == 40 and p.maps.weight.shape == (2, 2, 16, 2 * 6 * 16)
    assert load_projections([saved], nano.load_pair(), 5.0).keys() == {(1, 0)}


def test_a_map_above_the_bound_is_not_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["project", "--out", str(tmp_path / "map"), *FIT])
    assert done.exit_code == 2 and not (tmp_path / "map").exists()
    said = " ".join(done.stderr.split())
    assert "is above projection.max_kl 0.002" in said and "exact catch-up needs no map" in said


def test_a_run_may_ask_for_it(saved: Path) -> None:
    on = Workbench(load_config("nano", [f"projection.maps=[{saved}]", "projection.max_kl=5"]))
    q = on.queries("test", 8)
    requests = [Request(on.encode(x), query=x, max_new_tokens=64) for x in q]
    done = list(on.engine.rollout(requests, RandomRouter(0.5)))
    assert all(t.meta["approximate"] for t in done if len(set(t.models)) > 1 and t.models[-1] == 0)
    assert sum(t.meta["projected_tokens"][0] for t in done) > 50
    off = list(Workbench(load_config("nano", [])).engine.rollout(requests, RandomRouter(0.5)))
    assert not any("approximate" in t.meta for t in off)


def test_bad_input_is_named(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"projection.maps: .*map: .* above projection.max_kl 0.02"):
        load_projections([saved], nano.load_pair(), 0.02)
    models = nano.load_pair()
    with torch.no_grad():
        models[1].layers[0].qkv.weight[0] += 1
    with pytest.raises(ConfigError, match="the source of .* is no model of this pool"):
        load_projections([saved], models, 5.0)
    for flags, says in (
        (["--source", "tiny"], "--source: 'tiny' is not one of models.labels: small, large"),
        (["--target", "small"], "--target: 'small' is the source too"),
        (["projection.max_kl=-1"], "projection.max_kl: -1"),
        (["projection.ridge=[]"], "projection.ridge: is empty"),
    ):
        done = CliRunner().invoke(app, ["project", "--out", "nowhere", *flags])
        assert done.exit_code == 2 and says in " ".join(done.stderr.split()) and not Path("nowhere").exists()


def test_the_engine_is_exact_without_maps() -> None:
    bench = Workbench(load_config("nano", []))
    assert isinstance(bench.engine, StepEngine) and bench.engine.forward.projecting is None
