"""What `python -m bench.aot` compiles without a GPU: each kernel file lists its configurations as `AOT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AotSpec:
    """One kernel configuration.

    `args` gives the run-time arguments their types ("*bf16", "i32", "fp32"); a trailing ":16" says that the pointer or
    integer is a multiple of 16, as the launcher would find. `meta` gives the compile-time arguments, None for an absent
    pointer. `matrix` demands tensor-core instructions.
    """

    name: str
    kernel: Any
    args: Mapping[str, str]
    meta: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
