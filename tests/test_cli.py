"""The command line: doctor, rollouts that survive interruption, and errors a person can act on."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from roro_fast.cli import app
from roro_fast.cli_doctor import VARIABLES
from roro_fast.config_io import load_config
from roro_fast.runs import RunDirectory
from roro_fast.tasks.base import SPLITS
from roro_fast.train.setup import load_task
from tests import two_tokenizers
from tests.models.test_decoder import gemma3
from tests.processes import interrupt, spawn
from tests.tiny import overrides, save_pair, save_random, save_tiny
from tests.two_tokenizers import byte_fallback, byte_level

GOOD = {"problem": "How many ones are in three?", "answer": "3"}
ROLLOUT = ["task.n_train=120", "collect.n_queries=120", "collect.arms=[all_small, all_large]"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def trajectories(run):
    """{key: what a rollout decided and wrote}; wall clock left out."""
    kept = ("token_ids", "step_texts", "correct", "finish_reason")
    store = RunDirectory(run).store("collect")
    return {store.key(r): {k: r[k] for k in kept} | {"actions": [d["action"] for d in r["decisions"]]} for r in store}


def test_help_lists_the_commands():
    text = invoke("--help").output
    assert all(name in text for name in ("rollout", "pairs", "doctor"))


def test_version():
    from roro_fast import __version__

    assert invoke("--version").output.strip() == __version__


# -- doctor


def doctor(*args):
    result = invoke("doctor", "--json", *args)
    return result.exit_code, {(f["section"], f["name"]): f for f in json.loads(result.stdout)}


def test_doctor_names_an_implementation_for_every_op():
    code, found = doctor()
    serving = {
        name.split(":")[0] for (section, name), f in found.items() if section == "ops" and "serves" in f["detail"]
    }
    from roro_fast.ops import registry

    assert code == 0 and serving == set(registry.ops()) and "sample_step" in serving
    for name in ("vllm", "ray", "trl", "lm_eval", "triton", "flash-attn"):
        f = found["backends", name]
        assert f["status"] in ("ok", "absent") and f["detail"]
    assert ("extensions", "host (C++)") in found


def test_doctor_says_when_an_ordered_implementation_is_missing(monkeypatch):
    monkeypatch.setenv("RORO_IMPL", "sample_step=warp")
    code, found = doctor()
    assert code == 1 and "'warp'" in found["ops", "sample_step"]["detail"]


def test_doctor_passes_a_pair(pair):
    code, found = doctor(*pair)
    assert code == 0
    assert "one tokenizer" in found["models", "tokenizer"]["detail"]
    assert "x the first" in found["models", "cost ratio"]["detail"]
    assert "parameters" in found["models", str(pair[0])]["detail"]


def test_doctor_finds_the_faults_of_a_pool(pair, tmp_path):
    code, found = doctor(pair[1], pair[0], "--delimiter", "@@")
    assert code == 1
    assert "smallest first" in found["models", "cost ratio"]["detail"]
    assert found["models", f"{pair[0]} delimiter"]["status"] == "fault"
    other = save_tiny(tmp_path / "other", hidden=32, seed=3)
    spec = (other / "tokenizer.json").read_text().replace('"Ada"', '"Zoe"')
    (other / "tokenizer.json").write_text(spec)
    code, found = doctor(pair[0], other, tmp_path / "gone")
    assert code == 1 and found["models", str(tmp_path / "gone")]["status"] == "fault"
    code, found = doctor(pair[0], other)
    assert code == 1 and "different tokenizers" in found["models", "tokenizer"]["detail"]


def test_doctor_names_tokenizers_and_families(pair, tmp_path):
    small = save_random(tmp_path / "small", len(byte_level()), 0, hidden=16, layers=1, seed=1, context=256)
    gemma = gemma3(vocab_size=len(byte_fallback()), hidden_size=64, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(gemma).save_pretrained(large := tmp_path / "large")
    byte_level().save_pretrained(small)
    byte_fallback().save_pretrained(large)
    code, found = doctor(small, large)
    assert code == 0, found
    detail = found["models", "tokenizer"]["detail"]
    assert detail.startswith(f"2 tokenizers ({small}; {large})") and "tokenised again" in detail
    assert found["models", "families"]["detail"] == "qwen3, gemma3_text: across families"
    assert "windows of 8" in found["models", str(large)]["detail"]
    spec = json.loads((large / "config.json").read_text()) | {"model_type": "mamba"}
    (large / "config.json").write_text(json.dumps(spec))
    code, found = doctor(small, large)
    detail = found["models", str(large)]["detail"]
    assert code == 1 and all(word in detail for word in ("'mamba'", "llama", "qwen2", "qwen3", "gemma3_text"))


def test_doctor_asks_a_hub_for_no_weights(tmp_path, monkeypatch):
    asked = []

    def fetched(name, allow_patterns):
        asked.extend(allow_patterns)
        path = save_tiny(tmp_path / name.partition("/")[2], hidden=16 if name == "some/small" else 32)
        (path / "model.safetensors").unlink()
        return str(path)

    def listed(name):
        return ["config.json", "pytorch_model.bin" if name == "some/pickled" else "model.safetensors"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr("huggingface_hub.list_repo_files", listed)
    code, found = doctor("some/small", "some/large")
    assert code == 0 and "*.safetensors" not in asked
    assert "a run fetches them" in found["models", "some/large"]["detail"]
    code, found = doctor("some/small", "some/pickled")
    assert code == 1 and "no safetensors weights" in found["models", "some/pickled"]["detail"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_without_the_gpu_it_is_asked_about(pair):
    code, found = doctor(*pair, "--device", "cuda")
    assert code == 1 and "torch sees no GPU" in found["ops", "cuda"]["detail"]
    assert found["models", "cost ratio"]["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(more=torch.zeros(2)), "unexpected tensor more"),
        (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}), "model.norm.weight is int8"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "has shape (3,)"),
    ],
)
def test_doctor_reads_the_weights_headers(tmp_path, change, words):
    small, large = save_pair(tmp_path)
    tensors = load_file(small / "model.safetensors")
    change(tensors)
    save_file(tensors, small / "model.safetensors")
    code, found = doctor(small, large)
    assert code == 1 and words in found["models", str(small)]["detail"]
    assert found["models", str(large)]["status"] == "ok"
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    assert "only pickled weights" in doctor(small, large)[1]["models", str(small)]["detail"]


def test_doctor_checks_what_a_config_needs(pair):
    one = [f"models.paths=[{pair[1]}, {pair[1]}]", "models.layers=[1, 0]"]
    code, found = doctor("-c", "nano", *one)
    assert code == 0, found
    assert found["models", "cost ratio"]["status"] == "ok"
    assert doctor("-c", "nano", one[0])[1]["models", "cost ratio"]["status"] == "fault"
    assert "640 train, 100 calibrate, 200 test" in found["run", "task ledger"]["detail"]
    assert {n for s, n in found if s == "run"} == {"task ledger", "stage rubric", "stage evaluate"}
    bad = ["rubric.judge=nowhere", "eval.arms=[all_small, all_large, rsd]", "task.name=gym:no_such"]
    code, found = doctor("-c", "nano", *one, *bad)
    assert code == 1 and "rubric.judge: no directory 'nowhere'" in found["run", "stage rubric"]["detail"]
    assert found["run", "task gym:no_such"]["status"] == found["run", "stage evaluate"]["status"] == "fault"
    assert "eval.prm: arm 'rsd'" in doctor("-c", "nano", *one, *bad[:2])[1]["run", "stage evaluate"]["detail"]


def test_doctor_table_is_readable():
    result = invoke("doctor")
    assert result.exit_code == 0 and "sample_step: reference" in result.output
    assert result.output.splitlines()[-1].startswith("ready: ")


def test_doctor_reads_the_environment(monkeypatch):
    monkeypatch.setenv("RORO_PROFLE", "torch")
    monkeypatch.setenv("RORO_PROFILE", "nsight")
    monkeypatch.setenv("RORO_DEBUG", "1")
    result = invoke("doctor")
    assert result.exit_code == 1 and "did you mean RORO_PROFILE?" in result.output
    assert result.output.splitlines()[-1] == "2 faults: environment: RORO_PROFILE, environment: RORO_PROFLE"


def test_doctor_knows_every_variable_that_is_read():
    root = Path(__file__).parents[1]
    sources = [*(root / "roro_fast").rglob("*.py"), *(root / "kernels").rglob("*.py"), root / "setup.py"]
    sources += [p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    read = {
        name
        for path in sources
        for name in re.findall(r"(?:environ[^\n]*|getenv\()\"(RORO_[A-Z_]+)\"", path.read_text(encoding="utf-8"))
    }
    assert read and read <= set(VARIABLES)


# -- errors


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rollout", "router.bta=1"], ["router.bta", "did you mean router.beta"]),
        (["rollout", "-c", "missing.yaml"], ["missing.yaml", "presets are"]),
        (["rollout", "models.paths=[only]"], ["at least two models"]),
        (["rollout", "--run", "nowhere"], ["nowhere", "not a run directory"]),
        (["rollout", "--redo", "cooking"], ["--redo", "cooking", "collect"]),
        (["doctor", "--dtype", "int3"], ["--dtype", "float32"]),
        (["doctor", "--device", "abacus"], ["--device", "cpu"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert all(w in result.stderr for w in words), result.stderr


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    p = spawn("--debug", "rollout", "router.bta=1")
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and "Traceback" in err and "ConfigError" in err


def test_corrupt_checkpoint_is_named(pair, tmp_path):
    small, large = save_pair(tmp_path)
    (large / "model.safetensors").write_bytes(b"\x00" * 40)
    result = invoke("rollout", *overrides(tmp_path, small, large))
    assert result.exit_code == 2 and "model.safetensors: corrupt" in result.stderr


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["rubric.judge=nowhere"], "rubric.judge: no directory 'nowhere'"),
        (["rubric.trainer=trl", "trl.rollouts=vllm"], "trl.rollouts: 'vllm' needs the package vllm"),
        (["eval.arms=[all_small, all_large, rsd]"], "eval.prm: arm 'rsd' needs a process reward model"),
        (["eval.arms=[all_small, all_large, rsd]", "eval.prm=nowhere"], "eval.prm: no directory 'nowhere'"),
        (["eval.arms=[all_small, all_large, spec_reason]", "eval.rating=nowhere"], "eval.rating: no directory"),
        (["eval.arms=[all_small, all_large, rsd]", "eval.prm=PAIR"], "prm.labels: ' true' is not a single known"),
        (["task.name=gym:chain_sum"], "eval.arms: 'oracle' needs a task that verifies steps"),
        (["task.name=arithmetic_held_out"], "eval.arms: 'oracle' needs a task that verifies steps"),
        (["task.name=FILE", "task.split_by=train"], "has no 'test' split"),
        (["task.name=FILE"], "has no test queries"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_before_any_work(pair, tmp_path, extra, words):
    cross = two_tokenizers.save_pair(tmp_path / "cross")
    (tmp_path / "f.jsonl").write_text(json.dumps({"id": 1, **GOOD}) + "\n")
    extra = [x.replace("FILE", str(tmp_path / "f.jsonl")).replace("PAIR", str(cross[1])) for x in extra]
    result = invoke("quickstart", *overrides(tmp_path, *pair), *extra)
    assert result.exit_code == 2 and words in result.stderr, result.output
    assert not (tmp_path / "tiny").exists()


# -- rollout


@pytest.fixture(scope="module")
def uninterrupted(pair, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    result = invoke("rollout", *overrides(root, *pair), *ROLLOUT)
    assert result.exit_code == 0, result.output
    return root / "tiny", result


def test_rollout_stores_every_arm_and_prints_a_table(uninterrupted):
    run, result = uninterrupted
    found = trajectories(run)
    assert len(found) == 240 and {k[1] for k in found} == {"all_small", "all_large"}
    assert "all_small" in result.output and "240 trajectories" in result.output
    assert all(word in result.output for word in ("kept", "all", "discarded"))
    assert all(r["correct"] is not None for r in found.values())
    summary = json.loads((run / "stages" / "collect.json").read_text())
    assert summary["done"] and summary["summary"]["trajectories"] == 240
    small = [r["cost"] for r in RunDirectory(run).store("collect") if r["arm"] == "all_small"]
    for key in ("total_flops", "seconds"):
        mean = sum(c[key] for c in small) / len(small)
        assert summary["summary"]["arms"]["all_small"][key] == pytest.approx(mean)


def test_a_second_call_does_nothing_again(uninterrupted):
    run, _ = uninterrupted
    before = trajectories(run)
    result = invoke("rollout", "--run", run)
    assert result.exit_code == 0 and "done before" in result.output and trajectories(run) == before


def test_changed_settings_are_refused_and_redo_obeys(pair, tmp_path):
    args = [*overrides(tmp_path, *pair), "collect.arms=[all_small]", "collect.n_queries=2"]
    assert invoke("rollout", *args).exit_code == 0
    result = invoke("rollout", *args, "engine.max_steps=2")
    assert result.exit_code == 2 and "engine.max_steps" in result.stderr and "--redo collect" in result.stderr
    result = invoke("rollout", "--run", str(tmp_path / "tiny"))
    assert result.exit_code == 0, f"a refused command replaced the run's config: {result.stderr}"
    missing = invoke("rollout", *args, "run.name=none", "models.paths=[/no/such, /no/other]")
    assert missing.exit_code == 2 and not (tmp_path / "none").exists()
    result = invoke("rollout", *args, "engine.max_steps=2", "--redo", "collect")
    assert result.exit_code == 0, result.stderr
    assert len(trajectories(tmp_path / "tiny")) == 2


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_rollout_goes_on_to_the_same_result(pair, tmp_path, uninterrupted, sign, code):
    args = ["rollout", *overrides(tmp_path, *pair), *ROLLOUT]
    run = tmp_path / "tiny"
    shard = run / "trajectories" / "collect" / "part-00000.jsonl"
    p = spawn(*args, dawdle_after=shard)
    err = interrupt(p, sign, shard)
    assert p.returncode == code, err
    if sign != signal.SIGKILL:
        assert "run the same command to go on" in err and "Traceback" not in err
    kept = trajectories(run)
    assert 64 <= len(kept) < 240
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    assert trajectories(run) == trajectories(uninterrupted[0])


def test_too_long_prompts_are_counted_and_the_run_goes_on(tmp_path):
    small, large = save_pair(tmp_path, context=36)
    result = invoke("rollout", *overrides(tmp_path, small, large), "collect.arms=[all_small]", "collect.n_queries=24")
    assert result.exit_code == 0, result.stderr
    summary = json.loads((tmp_path / "tiny" / "stages" / "collect.json").read_text())["summary"]
    assert summary["finish"].get("refused", 0) > 0 and summary["trajectories"] == 24
    assert "refused" in result.output


def test_trajectories_are_readable_by_datasets_and_as_parquet(uninterrupted, tmp_path):
    datasets = pytest.importorskip("datasets")
    run, _ = uninterrupted
    result = invoke("rollout", "--run", run, "--parquet", tmp_path / "t.parquet")
    assert result.exit_code == 0 and "240 trajectories written" in result.output
    cache = str(tmp_path / "cache")
    shards = str(run / "trajectories" / "collect" / "part-*.jsonl")
    lines = datasets.load_dataset("json", data_files=shards, split="train", cache_dir=cache)
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "t.parquet"), split="train", cache_dir=cache)
    assert lines["token_ids"] == table["token_ids"] and len(lines) == 240


@pytest.mark.parametrize(
    ("lines", "extra", "code", "words"),
    [
        ([GOOD, {"problem": "no answer here"}, GOOD], [], 0, ["1 malformed rows skipped", "2 trajectories"]),
        ([GOOD, {"problem": "no answer here"}], ["task.strict=true"], 2, ["line 2", "'answer'"]),
        ([], [], 2, ["empty"]),
        ([GOOD], ["task.split_by=test"], 2, ["task.split", "train"]),
    ],
)
def test_benchmark_files(pair, tmp_path, lines, extra, code, words):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(lines)))
    args = [*overrides(tmp_path, *pair), f"task.name={path}", "task.split_by=train", "collect.arms=[all_small]", *extra]
    result = invoke("rollout", *args)
    assert result.exit_code == code, result.output
    assert all(w in result.output for w in words), result.output


def test_a_file_serves_all_stages_by_itself(pair, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), **GOOD}) + "\n" for i in range(90)))
    settings = [*overrides(tmp_path, *pair), f"task.name={path}", "collect.arms=[all_small]", "collect.n_queries=9"]
    result = invoke("rollout", *settings)
    assert result.exit_code == 0 and "9 trajectories" in result.output, result.output
    ids = {split: {q.id for q in load_task(load_config("nano", settings)).queries(split)} for split in SPLITS}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 90 and all(ids.values())


def test_pairs_without_any_signal_say_why(uninterrupted):
    result = invoke("pairs", "--run", uninterrupted[0])
    assert result.exit_code == 2 and "all wrong" in result.stderr and "collect.n_queries" in result.stderr
