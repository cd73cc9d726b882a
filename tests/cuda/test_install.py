"""`RORO_BUILD_CUDA=1 pip install .`: setup.py puts the CUDA kernels into the package, or says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from roro_fast.ops import build_cuda, native_cuda

ROOT = Path(__file__).parents[2]
NO_CUDA = "/usr/bin:/bin"

# What pip runs, without the C++ extensions, which other tests build.
BUILD = """
import sys
from distutils.core import run_setup
import torch.utils.cpp_extension  # loaded before the search path is cut
dist = run_setup("setup.py", ["build_ext", "--build-lib", sys.argv[1]], stop_after="commandline")
dist.ext_modules = []
if sys.argv[2] == "bare":
    sys.path[:] = [p for p in sys.path if "site-packages" not in p]
dist.run_commands()
print(*dist.get_command_obj("build_ext").get_outputs(), sep="\\n")
"""


def install(into: Path, mode: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import setuptools\n" + BUILD, str(into), mode]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_builds_the_kernels_into_the_package(tmp_path: Path) -> None:
    if build_cuda.nvcc() is None:
        pytest.skip("needs nvcc")
    from_pypi = any((Path(p) / "nvidia/cu13/bin/nvcc").is_file() for p in sys.path)  # finds its libraries less easily
    found = {"PATH": NO_CUDA, "CUDA_HOME": str(tmp_path)} if from_pypi else {}
    done = install(tmp_path, "as it is", RORO_BUILD_CUDA="1", **found)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "roro_fast" / "_cuda.so"
    assert str(library) in done.stdout.splitlines()
    assert native_cuda._built_from(library) == build_cuda.fingerprint()


def test_says_what_is_missing_without_nvcc(tmp_path: Path) -> None:
    done = install(tmp_path, "bare", RORO_BUILD_CUDA="1", PATH=NO_CUDA, CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    for says in ("RORO_BUILD_CUDA=1", "nvcc is missing", "pip install nvidia-cuda-nvcc", "--no-build-isolation"):
        assert says in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.so*"))


@pytest.mark.parametrize("value", ["", "0"])
def test_leaves_cuda_alone_unless_asked(tmp_path: Path, value: str) -> None:
    done = install(tmp_path, "bare", RORO_BUILD_CUDA=value, PATH=NO_CUDA, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "_cuda" not in done.stdout and not list(tmp_path.rglob("*.so"))
