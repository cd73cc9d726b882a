"""The training script: its data, resuming, and that it reproduces the shipped pair's recorded loss curve."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models import nano, nano_tokenizer
from roro_fast.models.loading import load_decoder, tensors_of
from roro_fast.models.nano_data import IGNORE, make_batch
from roro_fast.models.train_nano import RECIPES, Recipe, Trainer, learning_rate
from roro_fast.models.training_run import override
from roro_fast.tasks import ledger

TINY = Recipe(
    hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate=16, steps=12, batch=4, warmup=3, eval_every=1000
)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in rows]


@pytest.mark.parametrize("step", range(6))
def test_batches_are_reference_solutions_of_train_problems(step: int) -> None:
    tokenizer = nano_tokenizer.build()
    batch = make_batch(3, step, 8)
    eos = tokenizer.token_to_id("<eos>")
    for row in range(8):
        ids, targets = batch.ids[row].tolist(), batch.targets[row].tolist()
        first = next(i for i, t in enumerate(targets) if t != IGNORE)
        prompt = tokenizer.decode(ids[: first + 1])
        completion = [t for t in targets if t != IGNORE]
        assert completion[-1] == eos and completion[:-1] == ids[first + 1 : first + len(completion)]
        start, lines = ledger.parse_query(prompt)
        assert prompt == ledger.render_query(prompt.split("'")[0], prompt.split()[3], start, lines)
        assert tokenizer.decode(completion[:-1]) == "".join(ledger.render_steps(start, lines))
        kinds = [line.kind.name for line in lines]
        assert ledger.split_of(kinds) == "train"
        assert [ledger.KINDS[k].name for k in batch.kinds[row].tolist()] == kinds
        value = start
        for line, column in zip(lines, batch.results[row].tolist(), strict=True):
            value = line.kind.apply(value, line.operand)
            assert tokenizer.decode([targets[column]]) == f" {value}"


def test_batches_follow_the_task_distribution() -> None:
    drawn = torch.cat([make_batch(0, i, 64).kinds.flatten() for i in range(60)]).bincount(minlength=len(ledger.KINDS))
    rng = random.Random(0)
    counts = dict.fromkeys((k.name for k in ledger.KINDS), 0)
    for _ in range(4000):
        kinds = [x.kind.name for x in ledger.sample_problem(rng)[3]]
        if ledger.split_of(kinds) == "train":
            for k in kinds:
                counts[k] += 1
    ours = drawn / drawn.sum()
    theirs = torch.tensor(list(counts.values())) / sum(counts.values())
    assert (ours - theirs).abs().max() < 0.02


def test_batch_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(make_batch(1, 5, 8).ids, make_batch(1, 5, 8).ids)
    others = [make_batch(2, 5, 8).ids, make_batch(1, 6, 8).ids]
    assert not any(o.shape == make_batch(1, 5, 8).ids.shape and torch.equal(o, make_batch(1, 5, 8).ids) for o in others)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path / "whole").run(quiet=True)
    broken = Trainer(TINY, tmp_path / "broken")
    broken.run(until=5, quiet=True)
    with broken.trainer:
        for _ in range(3):  # steps after the last checkpoint, lost with the process
            broken.train_step()
    with (tmp_path / "broken" / "train_log.jsonl").open("a") as log:
        log.write('{"step": 6, "tokens": 0, "loss": 99.0}\n')
    resumed = Trainer(TINY, tmp_path / "broken")
    assert resumed.step == 5
    resumed.run(quiet=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert [s for s, _ in losses(tmp_path / "whole")] == list(range(1, 13))
    a, b = (tensors_of(load_decoder(tmp_path / d / "model")) for d in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list(tmp_path.rglob("*.part"))


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).run(quiet=True)
    want = (tmp_path / "train_log.jsonl").read_text()
    again = Trainer(TINY, tmp_path)
    again.run(quiet=True)
    assert again.step == TINY.steps and (tmp_path / "train_log.jsonl").read_text() == want


def test_foreign_state_is_refused(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).run(until=2, quiet=True)
    with pytest.raises(CheckpointError, match="another recipe"):
        Trainer(replace(TINY, lr=1.0), tmp_path)


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).run(until=2, quiet=True)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        Trainer(TINY, tmp_path)


def test_training_learns(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=80, batch=16, lr=1e-2, warmup=5, log_every=1)
    Trainer(recipe, tmp_path).run(quiet=True)
    curve = losses(tmp_path)
    assert curve[-1][1] < 0.7 * curve[0][1]


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    curve = [learning_rate(TINY, s) for s in range(TINY.steps + 1)]
    assert curve[0] == pytest.approx(TINY.lr / 3) and max(curve) == pytest.approx(TINY.lr)
    assert curve[-1] == pytest.approx(0.0) and curve[4:] == sorted(curve[4:], reverse=True)


@pytest.mark.parametrize(("setting", "message"), [("width=3", "unknown recipe key"), ("lr=fast", "is not a float")])
def test_bad_override_is_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(TINY, [setting])


@pytest.mark.parametrize("size", nano.SIZES)
def test_shipped_pair_is_reproduced_by_its_recorded_recipe(size: str, tmp_path: Path) -> None:
    """The first steps of the recorded log, with room for another CPU's rounding; a wrong seed is off by far more."""
    record = json.loads((nano.path(size) / "train.json").read_text())
    assert record["recipe"] == asdict(RECIPES[size])
    shipped = losses(nano.path(size))[:15]
    Trainer(RECIPES[size], tmp_path).run(until=15, quiet=True)
    again = losses(tmp_path)
    assert [s for s, _ in again] == [s for s, _ in shipped] == list(range(1, 16))
    assert [x for _, x in again] == pytest.approx([x for _, x in shipped], abs=2e-3)
    other = Trainer(replace(RECIPES[size], seed=RECIPES[size].seed + 1), tmp_path / "other")
    assert abs(other.train_step()["loss"] - shipped[0][1]) > 4e-3


def test_narrow_and_noise_shape_the_corpus_only() -> None:
    lines = ledger.KINDS
    batches = [make_batch(7, i, 64, narrow={"mul": 3, "sub2": 29}, noise=0.25) for i in range(12)]
    tokenizer = nano_tokenizer.build()
    right, seen = 0, []
    for b in batches:
        rows = torch.arange(len(b.ids))[:, None]
        operand = b.ids[rows, b.results - 3]
        before, after = b.ids[rows, b.results - 1], b.targets[rows, b.results]
        for k, o, x, y in zip(*(t.flatten().tolist() for t in (b.kinds, operand, before, after)), strict=True):
            kind = lines[k]
            o, x, y = (tokenizer.decode([t]).strip() for t in (o, x, y))
            operand_value = int(o) if kind.operands else 0
            right += kind.apply(int(x), operand_value) == int(y)
            seen.append((kind.name, operand_value))
    assert right / len(seen) == pytest.approx(0.75 + 0.25 / 100, abs=0.03)
    highest = {name: max(o for k, o in seen if k == name) for name in ("mul", "sub2", "add2")}
    assert highest["mul"] == 3 and highest["sub2"] == 29 and highest["add2"] > 90


def test_bad_narrow_is_named() -> None:
    with pytest.raises(ConfigError, match="narrow"):
        _ = replace(TINY, narrow="sub9=3").coverage
