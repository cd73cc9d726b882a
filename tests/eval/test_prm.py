"""Naming a step scorer: packaged heads, verdict settings, classifier directories, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForTokenClassification

from roro_fast.config_io import load_config
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.eval.prm import load_scorer, prm, rating
from roro_fast.eval.sweep import Runner
from roro_fast.models import nano_tokenizer
from roro_fast.routing.probe import ProbeScorer
from roro_fast.routing.rsd import RSD
from roro_fast.routing.scorers import ClassifierScorer, VerdictScorer
from roro_fast.routing.scoring import METER, Trace
from roro_fast.routing.spec_reason import SpecReason
from roro_fast.train import setup
from roro_fast.train.setup import Workbench
from tests.tiny import save_adapter, save_pair

TRACE = Trace("Ada's ledger of coins starts at 37 #0 pays 5 #1 Total?\n\n", (" pays 5: 37 gives 32 #1\n\n",))


@cache
def bench() -> Workbench:
    return Workbench(load_config("nano", []))


def test_the_packaged_pair_brings_its_heads() -> None:
    small, large = prm(bench(), "rsd"), rating(bench())
    assert isinstance(small, ProbeScorer) and small.body is bench().models[0]
    assert isinstance(large, ProbeScorer) and large.body is bench().models[1]


def test_other_pools_must_name_one(tmp_path: Path) -> None:
    paths = save_pair(tmp_path)
    other = Workbench(load_config("nano", [f"models.paths=[{paths[0]}, {paths[1]}]"]))
    with pytest.raises(ConfigError, match=r"eval\.prm: arm 'rsd' needs"):
        prm(other, "rsd")
    named = Workbench(load_config("nano", [f"models.paths=[{paths[0]}, {paths[1]}]", "eval.prm=nano/prm-small"]))
    assert isinstance(prm(named, "rsd"), ProbeScorer)


def test_kinds_of_directories(tmp_path: Path) -> None:
    nano_tokenizer.save(tmp_path / "c")
    c = Qwen3Config(vocab_size=223, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, num_labels=1)  # fmt: skip
    Qwen3ForTokenClassification(c).save_pretrained(tmp_path / "c")
    assert isinstance(load_scorer(str(tmp_path / "c"), bench()), ClassifierScorer)
    (tmp_path / "v").mkdir()
    said = {"kind": "verdict", "model": "nano/large", "labels": [" 1", " 0"], "values": [1, 0], "question": "\n"}
    (tmp_path / "v" / "prm.json").write_text(json.dumps(said))
    verdict = load_scorer(str(tmp_path / "v"), bench())
    assert isinstance(verdict, VerdictScorer) and verdict.model is bench().models[1]
    assert 0 < verdict.score([TRACE])[0].values[0] < 1
    small, _ = save_pair(tmp_path / "lm")
    assert isinstance(load_scorer(str(small), bench()), VerdictScorer)


def test_a_model_from_the_hub_and_an_adapter_can_be_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = save_pair(tmp_path)
    monkeypatch.setattr(setup, "fetch", lambda name, key, weights: {"some/prm": small}[name])
    assert isinstance(load_scorer("some/prm", bench()), VerdictScorer)
    adapter = save_adapter(tmp_path / "adapter", large)
    adapted, plain = load_scorer(str(adapter), bench()), load_scorer(str(large), bench())
    assert isinstance(adapted, VerdictScorer) and adapted.score([TRACE])[0].values != plain.score([TRACE])[0].values


def test_plugged_in_models_route_real_answers(tmp_path: Path) -> None:
    nano_tokenizer.save(tmp_path)
    c = Qwen3Config(vocab_size=223, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, max_position_embeddings=256, num_labels=1)  # fmt: skip
    Qwen3ForTokenClassification(c).save_pretrained(tmp_path)
    b = bench()
    prompts = [(q, b.encode(q)) for q in b.queries("calibrate", 3)]
    digits = [f" {k}" for k in range(10)]
    rater = VerdictScorer(
        b.models[1], b.tokenizer, labels=digits, values=[k / 9 for k in range(10)], question=" at most"
    )
    for policy in (RSD(load_scorer(str(tmp_path), b), 0.5), SpecReason(rater, 4.5)):
        done = Runner(b.engine, b.task, prompts, {"max_new_tokens": 64, "max_steps": 8}).trajectories(policy, "x")
        for t in done:
            scores = [d.features[0] for d in t.decisions if d.features]
            assert len(scores) == len(t.steps) and [s < policy.threshold for s in scores] == [m > 0 for m in t.models]
            assert t.meta[METER]["flops"] > 0 and t.meta[METER]["tokens"] >= len(t.prompt_ids) + len(t.token_ids) - 1


def test_what_is_no_scorer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"eval\.prm: no directory 'nano/prm-medium'; .*nano/prm-small"):
        load_scorer("nano/prm-medium", bench())
    with pytest.raises(CheckpointError, match="no directory 'nano/small'"):
        load_scorer("nano/small", bench())
    with pytest.raises(CheckpointError, match=r"neither prm\.json nor"):
        load_scorer(str(tmp_path), bench())
    (tmp_path / "prm.json").write_text('{"kind": "oracle"}')
    with pytest.raises(CheckpointError, match="kind 'oracle' is unknown"):
        load_scorer(str(tmp_path), bench())
