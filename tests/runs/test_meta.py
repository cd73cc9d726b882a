from __future__ import annotations

from pathlib import Path

import pytest

from roro_fast.runs.meta import cpu_name

FIRST = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu vme\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (FIRST + "\nprocessor\t: 1\nmodel\t\t: 99\n", "AMD EPYC (family 25, model 17)"),
        ("processor\t: 0\nmodel name\t: Some ARM core\n", "Some ARM core"),
    ],
)
def test_cpu_name(tmp_path: Path, text: str, name: str) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    assert cpu_name(info) == name


def test_cpu_name_without_the_file(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "none")
