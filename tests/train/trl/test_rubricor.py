"""GRPO of the Rubricor by TRL: rewards to the letter, the native trainer's update, other generators, resumption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roro_fast.config import RubricConfig
from roro_fast.config_trl import TrlConfig
from roro_fast.errors import ConfigError
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pairs import build_pairs
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.rubric.seeds import seed_rubrics
from roro_fast.train.rubricor_training import rubric_rewards, train_rubricor
from roro_fast.train.setup import resolve_model
from roro_fast.train.trl import trainers as trl_trainers
from roro_fast.train.trl.trainers import TrlTrainers
from tests.rubric.samples import POOL, queries, routed
from tests.tiny import save_tiny

pytest.importorskip("trl")
EXACT = TrlConfig(bf16=False, micro_batch=64)


@pytest.fixture(scope="module")
def pairs():
    qs = [q for q in queries(60) if len(q.meta["kinds"]) == 4][:4]
    return build_pairs({q.id: q for q in qs}, [t for q in qs for t in routed(q, 8, {1})], POOL)[0]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge.load(save_tiny(tmp_path_factory.mktemp("judge"), hidden=16))


@pytest.fixture(scope="module")
def schooled(tmp_path_factory, pairs):
    """The packaged reader after a little SFT by TRL: some of what it samples is a rubric, some is not."""
    r = Rubricor.load(resolve_model("nano/reader"))
    seeds = seed_rubrics(pairs, POOL.labels, most=3)
    config = RubricConfig(sft_steps=12, sft_lr=1e-3, batch_size=8)
    loss = TrlTrainers(EXACT).warm_up_rubricor(r, {p.query_id: p.prompt for p in pairs}, seeds, config, seed=0)
    assert loss < 1.0
    path = tmp_path_factory.mktemp("schooled")
    r.save(path)
    return path


def flat(rubricor: Rubricor) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in rubricor.model.parameters()])


def test_malformed_rubrics_earn_minus_one_as_in_the_native_rewards(pairs, judge, schooled):
    from roro_fast.train.trl.rubricor import RubricReward

    r = Rubricor.load(schooled)
    seeds, e = seed_rubrics(pairs, POOL.labels), r.encoder
    p = pairs[0]
    good = e.completion(seeds[p.query_id])
    written = [good, good[:-1], e.completion("no rubric at all"), e.completion(str(seeds[p.query_id]).split("\n")[0])]
    logged: dict[str, float] = {}
    rewards = RubricReward(r, judge, pairs, 4)(
        completion_ids=written, chosen=[[0, 1]] * 4, prompts=["x"] * 4, log_metric=logged.__setitem__
    )
    assert rewards[1:] == [-1.0, -1.0, -1.0] and logged["malformed"] == 0.75
    drafts = [[r.read(p.prompt, ids) for ids in written]]
    assert rewards == rubric_rewards(judge, [pairs[:2]], drafts)[0].tolist()


def test_one_update_is_the_native_one(pairs, judge, schooled):
    config = RubricConfig(steps=1, batch_size=8, rubricor_lr=1e-3, group_size=4, max_tokens=100, kl=0.0)
    native, ours = Rubricor.load(schooled), Rubricor.load(schooled)
    start = flat(native)
    want = train_rubricor(native, judge, pairs, config, seed=2)
    got = TrlTrainers(EXACT).train_rubricor(ours, judge, pairs, config, seed=2)
    assert want.informative > 0 and 0 < want.malformed < 1
    for key in ("reward", "informative", "malformed", "criteria"):
        assert getattr(got, key) == pytest.approx(getattr(want, key), abs=1e-5)
    # Adam's first step does not depend on the gradient's scale, in which alone the advantages of a group differ.
    a, b = flat(native) - start, flat(ours) - start
    assert float(a @ b / (a.norm() * b.norm())) > 0.99


class Cut(Exception):
    """Stands for a crash in the middle of a phase."""


def test_a_cut_phase_goes_on_to_the_same_weights(pairs, judge, schooled, tmp_path):
    config = RubricConfig(steps=3, batch_size=8, rubricor_lr=1e-3, group_size=3, max_tokens=60)
    trl = replace(EXACT, checkpoint_every=1, micro_batch=3)
    whole, again = Rubricor.load(schooled), Rubricor.load(schooled)
    want = TrlTrainers(trl).train_rubricor(whole, judge, pairs, config, seed=1)
    done: list[int] = []

    def tick() -> None:
        done.append(1)
        if len(done) == 2:
            raise Cut

    folders = tmp_path / "state", tmp_path / "logs"
    with pytest.raises(Cut):
        TrlTrainers(trl, *folders).train_rubricor(Rubricor.load(schooled), judge, pairs, config, seed=1, tick=tick)
    got = TrlTrainers(trl, *folders).train_rubricor(again, judge, pairs, config, seed=1, tick=tick)
    assert len(done) == 4 and got == want and torch.equal(flat(again), flat(whole))
    assert any((tmp_path / "logs" / "rubricor-1").glob("events.*"))


def test_adapted_weights_write_the_next_rollouts(pairs, judge, schooled, monkeypatch):
    r = Rubricor.load(schooled)
    seen: list[torch.Tensor] = [flat(r)]
    write = r.write

    def spy(*args, **kwargs):
        seen.append(flat(r))
        return write(*args, **kwargs)

    monkeypatch.setattr(r, "write", spy)
    config = RubricConfig(steps=2, batch_size=8, rubricor_lr=1e-2, group_size=4, max_tokens=60)
    TrlTrainers(replace(EXACT, lora_rank=4)).train_rubricor(r, judge, pairs, config, seed=2)
    assert [torch.equal(a, b) for a, b in zip(seen, [*seen[1:], flat(r)], strict=True)] == [True, False, False]


def test_generate_of_transformers_can_write_too(pairs, judge, schooled):
    config = RubricConfig(steps=1, batch_size=8, rubricor_lr=1e-3, group_size=4, max_tokens=60)
    r = Rubricor.load(schooled)
    start = flat(r)
    phase = TrlTrainers(replace(EXACT, rollouts="transformers")).train_rubricor(r, judge, pairs, config, seed=2)
    assert phase.malformed < 1 and not torch.equal(flat(r), start)


def test_a_prompt_that_reads_otherwise_as_text_is_refused(pairs, judge, schooled):
    odd = [replace(p, prompt=p.prompt + " <eos>") for p in pairs]  # the encoder reads it as plain characters
    with pytest.raises(ConfigError, match=r"trl\.rollouts.*'engine'"):
        TrlTrainers(replace(EXACT, rollouts="transformers")).train_rubricor(
            Rubricor.load(schooled), judge, odd, RubricConfig(steps=1), seed=0
        )


@pytest.mark.parametrize(
    ("config", "missing", "words"),
    [
        (TrlConfig(), "trl", r"rubric\.trainer.*roro-fast\[train\].*native"),
        (TrlConfig(lora_rank=8), "peft", r"trl\.lora_rank.*peft"),
        (TrlConfig(rollouts="vllm"), "vllm", r"trl\.rollouts.*roro-fast\[vllm\].*engine"),
    ],
)
def test_missing_packages_are_named_before_any_work(monkeypatch, config, missing, words):
    found = trl_trainers.find_spec
    monkeypatch.setattr(trl_trainers, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ConfigError, match=words):
        TrlTrainers(config)


def test_vllm_settings_reach_trl():
    from roro_fast.train.trl import arguments

    here = arguments.vllm(TrlConfig(rollouts="vllm", vllm_memory=0.4))
    there = arguments.vllm(TrlConfig(rollouts="vllm", vllm_mode="server", vllm_server="http://gpu:8000"))
    assert here == {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4}
    assert there == {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://gpu:8000"}
    args = arguments.grpo(
        "out", TrlConfig(), RubricConfig(), torch.device("cpu"), rows=12, most=8, lr=1e-6, seed=0, **there
    )
    assert args.use_vllm and (args.vllm_mode, args.vllm_server_base_url) == ("server", "http://gpu:8000")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.beta) == (6, 2, 1e-3)
