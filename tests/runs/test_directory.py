"""Run directories under real processes: killed writers, second writers, changed settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from roro_fast.config import Config
from roro_fast.config_io import load_config
from roro_fast.errors import ConfigError
from roro_fast.files import write_json
from roro_fast.runs import RunDirectory

WRITER = Path(__file__).with_name("writer.py")


def spawn(path, total, chunk, pause):
    args = [sys.executable, str(WRITER), str(path), str(total), str(chunk), str(pause)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, line):
    for text in process.stdout:
        if text.strip() == str(line):
            return
    raise AssertionError(process.stderr.read())


def test_kill_9_loses_at_most_the_buffer_and_resume_completes(tmp_path):
    run, total, chunk = tmp_path / "run", 60, 8
    for stop_after in (13, 37):
        p = spawn(run, total, chunk, 0.002)
        wait_for(p, stop_after)
        p.send_signal(signal.SIGKILL)
        p.wait(10)
        kept = [r["i"] for r in RunDirectory(run).store("collect")]
        assert sorted(set(kept)) == kept == list(range(len(kept)))
        assert len(kept) >= stop_after + 1 - chunk
    p = spawn(run, total, chunk, 0)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    assert [r["i"] for r in RunDirectory(run).store("collect")] == list(range(total))
    assert not list((run / "trajectories" / "collect").glob("*.part"))
    assert len(json.loads((run / "meta.json").read_text())["sessions"]) == 3


def test_second_writer_is_refused_while_the_first_lives(tmp_path):
    run = tmp_path / "run"
    first = spawn(run, 10_000, 8, 0.01)
    try:
        wait_for(first, 1)
        with pytest.raises(ConfigError, match=f"process {first.pid} "):
            RunDirectory(run, Config()).__enter__()
        assert len(RunDirectory(run).store("collect")) >= 0  # reading needs no lock
    finally:
        first.kill()
        first.wait(10)
    with RunDirectory(run, Config()):
        pass


def test_same_process_cannot_write_twice(tmp_path):
    with RunDirectory(tmp_path, Config()), pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        RunDirectory(tmp_path, Config()).__enter__()


def test_meta_describes_the_session(tmp_path):
    with RunDirectory(tmp_path, load_config("nano", ["run.seed=7"])):
        pass
    meta = json.loads((tmp_path / "meta.json").read_text())
    session = meta["sessions"][0]
    assert meta["seed"] == 7
    assert set(session["versions"]) >= {"python", "torch", "transformers", "roro_fast"}
    assert session["command"] and session["host"]["cpu"]
    assert load_config(tmp_path / "config.yaml").run.seed == 7


def test_reading_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"not a run directory.*config\.yaml"):
        RunDirectory(tmp_path)


def test_stage_marks_done_and_keeps_its_summary(tmp_path):
    with RunDirectory(tmp_path, Config()) as run:
        assert run.done("collect", ["collect"]) is None
        with run.stage("collect", ["collect"]) as summary:
            assert run.done("collect", ["collect"]) is None
            summary["count"] = 3
        mark = run.done("collect", ["collect"])
        assert mark is not None and mark.summary == {"count": 3} and mark.seconds > 0


def test_interrupted_stage_is_not_done(tmp_path):
    with RunDirectory(tmp_path, Config()) as run:
        with pytest.raises(KeyboardInterrupt), run.stage("collect", ["collect"]):
            raise KeyboardInterrupt
        assert run.mark("collect") is not None and run.done("collect", ["collect"]) is None


def test_changed_setting_of_a_stage_is_refused_by_name(tmp_path):
    with RunDirectory(tmp_path, Config()) as run, run.stage("collect", ["collect", "run"]):
        pass
    other = load_config(Config(), ["collect.samples=5", "run.name=renamed", "router.steps=9"])
    with RunDirectory(tmp_path, other) as run:
        with pytest.raises(ConfigError, match=r"collect\.samples: stage 'collect'.* ran with 1, now 5.*--redo collect"):
            run.done("collect", ["collect", "run"])
        run.forget("collect")
        assert run.done("collect", ["collect", "run"]) is None
    unrelated = load_config(Config(), ["run.name=renamed", "router.steps=9"])
    with RunDirectory(tmp_path, unrelated) as run, run.stage("collect", ["collect", "run"]):
        pass


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}


@pytest.mark.parametrize("module", ["roro_fast.runs", "roro_fast.config_io", "roro_fast.cli"])
def test_import_stays_light(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
