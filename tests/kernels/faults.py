"""Planted faults: a kernel's own source with one line made wrong, so that its test can be seen to fail."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_count = itertools.count()


def plant(module: ModuleType, folder: Path, right: str, wrong: str) -> ModuleType:
    """A second copy of `module` in which the one place that reads `right` reads `wrong`."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    if source.count(right) != 1:
        raise AssertionError(f"{source.count(right)} places in {module.__name__} read {right!r}; a fault needs one")
    name = f"{module.__name__.rpartition('.')[2]}_fault_{next(_count)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    faulty = importlib.util.module_from_spec(spec)
    sys.modules[name] = faulty
    spec.loader.exec_module(faulty)
    return faulty
