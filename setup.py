"""Builds the C++ extensions; everything else is in pyproject.toml.

Without a working C++ compiler the install goes on in pure Python and says so. RORO_REQUIRE_EXT=1 makes that a failure.
"""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

REQUIRED = os.environ.get("RORO_REQUIRE_EXT", "") not in ("", "0")


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
    """`build_ext` that says plainly what a failed extension means and carries on, unless extensions are required."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as e:
            if REQUIRED:
                raise
            report(f"{ext.name} was not built: {e}")


def report(reason):
    sys.stderr.write(
        f"\nroro_fast: {reason}\n"
        "roro_fast: the Python implementations serve instead; they give the same results, slower.\n"
        "roro_fast: for the native ones install a C++17 compiler and install again.\n\n"
    )


def extensions():
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as e:
        if REQUIRED:
            raise
        report(f"roro_fast._host was not built: {e}")
        return []
    host = Pybind11Extension(
        "roro_fast._host",
        ["csrc/bind_host.cpp", *sorted(glob("csrc/host/*.cpp"))],
        include_dirs=["csrc"],
        depends=sorted(glob("csrc/host/*.h")),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
        optional=not REQUIRED,
    )
    return [host]


setup(ext_modules=extensions(), cmdclass={"build_ext": ReportingBuildExt, "build_py": BuildPyWithKernels})
