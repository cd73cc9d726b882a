"""Random-weight models of real size, for throughput where no checkpoint is at hand, the same in every process.

Every tensor is drawn on the device from a seed made of its name, so that an engine and its peers hold equal weights
without a file being written. Under random weights all tokens are about equally likely: a set of p * V tokens whose text
contains the delimiter ends a step with probability p per sampled token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import assign

DELIMITER_PROBABILITY = 1 / 16
DELIMITER = "\n\n"
STD = 0.02  # of embeddings, and of matrices too unless a size asks for more


def _qwen3(
    layers: int, hidden: int, heads: int, kv: int, inter: int, tie: bool, vocab: int, dim: int, std: float = STD
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inter,
        "head_dim": dim,
        "tie_word_embeddings": tie,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": std,
    }


# Qwen3-0.6B and Qwen3-8B as published; tiny ones of the same family for tests. A tiny model's matrices are larger, so
# that what its layers add outweighs the embedding: under tied weights that alone would repeat the last token.
SIZES = {
    "qwen3": [
        _qwen3(28, 1024, 16, 8, 3072, True, 151936, 128),
        _qwen3(36, 4096, 32, 8, 12288, False, 151936, 128),
    ],
    "tiny": [_qwen3(n, 64, 4, 2, 128, True, 512, 32, 0.2) for n in (1, 2, 3, 4)],
}


def hf_config(spec: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    given = dict(spec)
    return AutoConfig.for_model(given.pop("model_type"), **given)


def config_of(spec: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig.from_hf(hf_config(spec))


def drawn(name: str, shape: torch.Size, std: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The tensor of that Hugging Face name: norms are 1, everything else is normal around 0."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    g = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(
        0.0, STD if "embed" in name or "head" in name else std, generator=g
    )


def hf_model(spec: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """The `transformers` model; made without initialisation, then filled by name."""
    from transformers import AutoModelForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(hf_config(spec))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(drawn(name, p.shape, spec["initializer_range"], dtype, device))
    return model.eval()


def decoder(spec: dict[str, Any], dtype: torch.dtype, device: str) -> Decoder:
    """This project's decoder with the same weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Decoder(config_of(spec))
    finally:
        torch.set_default_dtype(before)
    tensors = dict(hf_tensors(spec, dtype, device))
    assign(model, tensors, "random weights")
    del tensors
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # peers and the gate want that memory
    return model.to(device).eval().requires_grad_(False)  # rotary tables are made on the CPU


def hf_tensors(spec: dict[str, Any], dtype: torch.dtype, device: str) -> Iterable[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every parameter, drawn one by one."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(hf_config(spec))
    for name, p in skeleton.named_parameters():
        yield name, drawn(name, p.shape, spec["initializer_range"], dtype, device)


def delimiter_ids(vocab_size: int, probability: float = DELIMITER_PROBABILITY) -> range:
    """The last round(p * V) tokens of the vocabulary, whose text ends in the delimiter."""
    return range(vocab_size - round(probability * vocab_size), vocab_size)


@lru_cache(maxsize=2)
def tokenizer(vocab_size: int, probability: float = DELIMITER_PROBABILITY) -> Any:
    """A word-level tokenizer: token i reads "ti ", those of `delimiter_ids` a blank line more. Id 0 is EOS."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    ends = delimiter_ids(vocab_size, probability)
    vocab = {f"t{i} " + (DELIMITER if i in ends else ""): i for i in range(1, vocab_size)} | {"<eos>": 0}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
