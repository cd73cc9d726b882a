"""The house rules of the repository: import direction, file sizes, and `kernels/` that hides nobody else's package."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "roro_fast"

# What each part may import besides itself and the ground floor.
GROUND = {"errors", "config", "tasks", "files", "profiling", "runs", "_version"}
LADDER = ["ops", "models", "engine", "routing", "rubric", "train", "eval"]
ALLOWED = {part: set(LADDER[:i]) for i, part in enumerate(LADDER)}
ALLOWED["ops"] = {"kernels", "_host"}
ALLOWED["engine"] |= {"_host"}
ALLOWED["kernels"] = set()
ALLOWED["serve"] = {"ops", "models", "engine", "routing"}
ALLOWED["backends"] = {"ops", "models", "engine", "routing"}
ALLOWED["cli"] = {*LADDER, "serve", "backends"}


# Imported by the package they plug into, or only where it is asked for.
PLUGINS = {"roro_fast.eval.lm_harness", *(f"roro_fast.train.trl.{m}" for m in ("judge", "rubricor", "warm_up"))}


def part_of(module: str) -> str:
    """'roro_fast.engine.kv' -> 'engine'; files beside cli.py that carry its name (cli_train.py) are part of it."""
    part = module.split(".")[1]
    return "cli" if part.startswith("cli") or part == "__main__" else "config" if part.startswith("config") else part


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if name != f"{package.name}.__init__":
            yield name.removesuffix(".__init__"), path


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, imported roro_fast module) of every import statement, inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found = [f"{module}.{a.name}" for a in node.names] if module == "roro_fast" else [module]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("roro_fast."):
            found = [node.value] if importing_call(node.value) else []
        yield from ((node.lineno, m) for m in found if m.startswith("roro_fast."))


def importing_call(text: str) -> bool:
    """A string that names one of our modules (as `importlib.import_module` takes it)."""
    target = ROOT.joinpath(*text.split("."))
    return target.is_dir() or target.with_suffix(".py").is_file()


def violations(package: Path) -> list[str]:
    bad = []
    for name, path in modules(package):
        here = part_of(name)
        for line, target in imports(name, path):
            there = part_of(target)
            allowed = set() if here in GROUND else ALLOWED.get(here)
            if allowed is None:
                bad.append(
                    f"{name}: part {here!r} has no place in the house; add it to tests/test_house.py and the map"
                )
            elif there != here and there not in allowed | GROUND and not target.endswith("__version__"):
                bad.append(f"{path.relative_to(package.parent)}:{line}: {here} must not import {there} ({target})")
    return bad


def test_imports_run_one_way():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "verdict"),
    [
        ("engine/kv.py", "from roro_fast.routing import policy", "engine must not import routing"),
        ("engine/kv.py", "def f():\n    from roro_fast.train.router import x", "engine must not import train"),
        ("engine/kv.py", "from ..rubric import x", "engine must not import rubric"),
        ("engine/kv.py", "import roro_fast.cli", "engine must not import cli"),
        ("tasks/base.py", "from roro_fast import engine", "tasks must not import engine"),
        ("models/config.py", "x = __import__('roro_fast.eval')", "models must not import eval"),
        ("lodger/a.py", "from roro_fast.errors import RoroError", "part 'lodger' has no place"),
        ("train/a.py", "from roro_fast.engine import x\nfrom . import y", None),
        ("engine/a.py", "from roro_fast import __version__", None),
        ("cli.py", "from roro_fast.eval import report", None),
    ],
)
def test_the_import_test_can_fail(tmp_path, file, line, verdict):
    path = tmp_path / "roro_fast" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    found = violations(tmp_path / "roro_fast")
    assert len(found) == (verdict is not None) and all(verdict in f for f in found), found


def test_files_stay_small():
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    folders = ["roro_fast", "kernels", "csrc", "bench", "tests"]
    files = [p for d in folders for p in (ROOT / d).rglob("*") if p.suffix in suffixes] + [ROOT / "setup.py"]
    sizes = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {p: n for p, n in sizes.items() if n > 500} == {}


def run_python(code: str, cwd: Path, *path: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert p.returncode == 0, p.stderr
    return p.stdout.strip()


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_works_from_the_repository_root():
    code = """
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM
c = Qwen3Config(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                head_dim=8, intermediate_size=16, max_position_embeddings=32)
out = Qwen3ForCausalLM(c).generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, min_new_tokens=2)
import roro_fast.kernels
print(tuple(out.shape))
"""
    assert run_python(code, ROOT) == "(1, 5)"


def test_an_installed_kernels_package_wins_from_the_repository_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("here = 'the installed one'")
    assert run_python("import kernels; print(kernels.here)", ROOT, tmp_path) == "the installed one"


@pytest.fixture(scope="module")
def checkout_with_a_kernel(tmp_path_factory) -> Path:
    """A copy of the source tree with one more file in `kernels/`."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.part")
    for folder in ("roro_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, copy)
    (copy / "kernels" / "probe_op.py").write_text("where = __file__")
    return copy


def test_kernels_import_from_a_checkout(checkout_with_a_kernel, tmp_path):
    code = "from roro_fast.kernels import probe_op; print(probe_op.where)"
    found = run_python(code, tmp_path, checkout_with_a_kernel)
    assert found == str(checkout_with_a_kernel / "kernels" / "probe_op.py")


def test_the_built_package_carries_kernels_and_data(checkout_with_a_kernel, tmp_path):
    """What a wheel holds (its Python half), next to a foreign top-level `kernels` package."""
    site = tmp_path / "site-packages"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)],
        cwd=checkout_with_a_kernel,
        capture_output=True,
        check=True,
    )
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("where = 'foreign'")
    code = (
        "import kernels, roro_fast.kernels; from roro_fast.kernels import probe_op;"
        "print(kernels.where, probe_op.where, len(roro_fast.kernels.__path__))"
    )
    assert run_python(code, tmp_path, site) == f"foreign {site}/roro_fast/kernels/probe_op.py 1"
    source = checkout_with_a_kernel / "roro_fast"
    left_out = [
        str(p.relative_to(source))
        for p in source.rglob("*")
        if p.is_file() and not (site / "roro_fast" / p.relative_to(source)).exists()
    ]
    assert left_out == []


def third_party(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, top-level module, is it imported at import time) of every import from outside the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for top in {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"roro_fast"}:
            yield node.lineno, top, id(node) not in inner


def test_every_import_is_a_declared_dependency():
    """What is imported with the package must be a plain dependency; what a function imports may be an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {Requirement(r).name.lower() for extra in project["optional-dependencies"].values() for r in extra}
    base = {Requirement(r).name.lower() for r in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    bad = []
    for name, path in modules(PACKAGE):
        free = part_of(name) in {"serve", "backends", "kernels"} or name in PLUGINS
        for line, top, eager in third_party(path):
            owners = {d.lower().replace("_", "-") for d in distributions.get(top, [top])}
            if not owners & (base if eager and not free else base | optional):
                bad.append(f"{path.relative_to(ROOT)}:{line}: {top} is not in pyproject.toml's dependencies")
    assert bad == []
