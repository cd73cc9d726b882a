"""What a run directory says about where its results came from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("roro_fast", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def git_state(file: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that tracks `file`, None when none does or git is absent."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(file.parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name with its family and model, where the system tells: a virtual machine's name alone ("AMD
    EPYC") covers processors that differ twofold in FLOP/s."""
    try:
        first = info.read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = said.get("model name") or platform.processor() or platform.machine()
    return (
        f"{name} (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= set(said) else name
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "roro_fast": "source tree"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = found.get(name, "not installed")
    return found


def provenance() -> dict[str, Any]:
    """One session's record: when, by what command, with which versions, on which machine."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
        "git": git_state(Path(__file__)),
        "host": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }
