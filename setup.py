"""Builds the C++ extensions; everything else is in pyproject.toml.

Without a working C++ compiler the install goes on in pure Python and says so. RORO_REQUIRE_EXT=1 makes that a failure.
RORO_BUILD_CUDA=1 builds the CUDA kernels as well, with nvcc, and fails where it cannot.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

REQUIRED = os.environ.get("RORO_REQUIRE_EXT", "") not in ("", "0")
BUILD_CUDA = os.environ.get("RORO_BUILD_CUDA", "") not in ("", "0")


class BuildPyWithKernels(build_py):
    """`build_py` that also puts the top-level `kernels/` into the built package as `roro_fast.kernels`."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self.kernel_files():
                self.copy_file(source, target)

    def kernel_files(self):
        folder = os.path.join(self.build_lib, "roro_fast", "kernels")
        return [(source, os.path.join(folder, os.path.basename(source))) for source in sorted(glob("kernels/*.py"))]

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [target for _, target in self.kernel_files()]


class ReportingBuildExt(build_ext):
    """`build_ext` that says plainly what a failed extension means and carries on, unless extensions are required.

    The CUDA kernels, when asked for, come first: a missing nvcc should not take minutes to be noticed.
    """

    def run(self):
        if BUILD_CUDA:
            build_cuda(self.cuda_library())
        super().run()

    def cuda_library(self):
        return Path("" if self.inplace else self.build_lib, "roro_fast", "_cuda.so")

    def get_outputs(self):
        return super().get_outputs() + ([str(self.cuda_library())] if BUILD_CUDA and not self.inplace else [])

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as e:
            if REQUIRED:
                raise
            report(f"{ext.name} was not built: {e}")


def build_cuda(output):
    """Run `roro_fast/ops/build_cuda.py`, loaded by its path: an isolated build cannot import the package."""
    spec = importlib.util.spec_from_file_location("build_cuda", "roro_fast/ops/build_cuda.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        builder.build(output)
    except RuntimeError as e:
        sys.exit(
            f"\nroro_fast: RORO_BUILD_CUDA=1, but the CUDA kernels do not build: {e}\n"
            "roro_fast: an isolated build sees nvcc on PATH or in CUDA_HOME only; one from PyPI needs pip install "
            "--no-build-isolation. Unset RORO_BUILD_CUDA to go without.\n"
        )


def report(reason):
    sys.stderr.write(
        f"\nroro_fast: {reason}\n"
        "roro_fast: the Python implementations serve instead; they give the same results, slower.\n"
        "roro_fast: for the native ones install a C++17 compiler and install again.\n\n"
    )


def extensions():
    return [e for e in (host_extension(), kernel_extension()) if e is not None]


def host_extension():
    """Host structures of the scheduler: pybind11, one binary per Python version."""
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError as e:
        if REQUIRED:
            raise
        report(f"roro_fast._host was not built: {e}")
        return None
    ParallelCompile(default=0).install()
    return Pybind11Extension(
        "roro_fast._host",
        ["csrc/bind_host.cpp", *sorted(glob("csrc/host/*.cpp"))],
        include_dirs=["csrc"],
        depends=sorted(glob("csrc/host/*.h")),
        cxx_std=17,
        extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],  # FLOPs are counted to the bit
        optional=not REQUIRED,
    )


def kernel_extension():
    """CPU kernels as torch ops through torch's stable ABI: one binary for torch 2.11 to 2.13 and every Python.

    No -march: each kernel names its instruction sets itself and the best one is chosen at run time.
    """
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as e:
        if REQUIRED:
            raise
        report(f"roro_fast._C was not built: {e}")
        return None
    return Extension(
        "roro_fast._C",
        [f for f in sorted(glob("csrc/bind_torch*.cpp") + glob("csrc/cpu/*.cpp")) if "cuda" not in f],
        include_dirs=["csrc"],
        depends=[*sorted(glob("csrc/*.h")), *sorted(glob("csrc/cpu/*.h"))],
        language="c++",
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=[
            *("-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"),
            *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),  # the last: gcc 12's own AVX-512 headers
            *(f"-isystem{path}" for path in include_paths()),
            "-pthread",
        ],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        extra_link_args=["-pthread"],
        optional=not REQUIRED,
    )


setup(ext_modules=extensions(), cmdclass={"build_ext": ReportingBuildExt, "build_py": BuildPyWithKernels})
