"""The shipped adapters: small files that fit the preset, were trained as their records say, and answer."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from roro_fast.config_io import load_config
from roro_fast.eval.check_smol import measure
from roro_fast.models import lora, smol
from roro_fast.train.adapter_data import SYSTEM
from roro_fast.train.adapters import Recipe
from roro_fast.train.setup import load_pool

ASSETS = Path(str(files("roro_fast"))) / "assets"
SIZES, PAIRS = ("small", "large"), ("smol", "smol_gsm")  # a pair has the name of its preset
each_adapter = pytest.mark.parametrize(("pair", "size"), [(p, s) for p in PAIRS for s in SIZES])


@each_adapter
def test_adapters_are_small_and_fit_the_preset(pair, size):
    config = load_config(pair)
    listed = config.models.layers[SIZES.index(size)] or list(range(30))
    assert config.models.paths[SIZES.index(size)] == f"{pair}/{size}" and config.task.system == SYSTEM
    directory = ASSETS / pair / size
    assert (directory / lora.WEIGHTS).stat().st_size <= 16_000_000
    settings = lora.read_config(directory)
    recipe = Recipe(**json.loads((directory / "train.json").read_text())["recipe"])
    assert recipe.layers(30) == listed and settings["layers_to_transform"] == listed[recipe.first :]
    assert lora.base_of(directory) == "smol" and (settings["r"], settings["lora_alpha"]) == (recipe.rank, recipe.alpha)
    with safe_open(directory / lora.WEIGHTS, "pt") as f:
        assert {int(name.split(".")[4]) for name in f.keys()} == set(listed[recipe.first :])  # noqa: SIM118


@each_adapter
def test_records_agree_with_the_log(pair, size):
    record = json.loads((ASSETS / pair / size / "train.json").read_text())
    rows = [json.loads(line) for line in (ASSETS / pair / size / "train_log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == record["steps"] == record["recipe"]["steps"] and rows[-1]["tokens"] == record["tokens"]
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows})
    assert rows[-1]["held_out_loss"] < rows[9]["held_out_loss"]


@pytest.mark.parametrize("pair", PAIRS)
def test_assets_are_small_and_free_of_pickle(pair):
    found = [p for p in (ASSETS / pair).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in found) <= 25 * 2**20
    assert {p.suffix for p in found} <= {".json", ".jsonl", ".safetensors", ".md"}


@pytest.fixture(scope="module")
def weights() -> None:
    if not (smol.cache_dir() / smol.NAME / "model.safetensors").is_file():
        pytest.skip("the smol weights are not in the cache; `python -m roro_fast.models.smol` fetches them")


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_the_pair_shares_its_first_layers_bit_for_bit(weights, pair):
    (small, large), _ = load_pool(load_config(pair).models)
    shared = ("embed.", "norm.", *(f"layers.{i}." for i in range(8)))
    a, b = small.state_dict(), large.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith(shared))
    assert not any(torch.equal(a[k], b[k]) for k in a if k.startswith("layers.8.") and "norm" not in k)


@pytest.mark.slow
def test_the_large_model_answers_what_the_small_one_cannot(weights):
    found = measure(["task.seed=3"], "calibrate", 40, ["arithmetic"])["mixtures"]["arithmetic"]
    assert found["large"]["accuracy"] >= max(0.8, found["small"]["accuracy"] + 0.1)
