"""Common first layers are found where they are equal to the bit, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.models.trunk import shared_layers, trunk_params
from tests.models.test_decoder import CASES, save_random


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    save_random(CASES["qwen3"], tmp_path)
    return load_decoder(tmp_path)


def shallow(model: Decoder, layers: int) -> Decoder:
    out = copy.deepcopy(model)
    out.layers, out.config = out.layers[:layers], replace(out.config, num_layers=layers)
    return out


def test_first_layers_of_one_another(model: Decoder) -> None:
    n = model.config.num_layers
    assert shared_layers([model]) == shared_layers([]) == 0
    assert shared_layers([model, model]) == shared_layers([model, copy.deepcopy(model)]) == n
    assert shared_layers([shallow(model, n - 1), model]) == shared_layers([model, shallow(model, n - 1)]) == n - 1
    assert shared_layers([model, model, shallow(model, 1)]) == 1
    assert trunk_params(model, 0) == 0
    assert model.config.num_params - trunk_params(model, 1) == shallow(model, n - 1).config.num_params


@torch.no_grad()
def nudge(t: torch.Tensor) -> None:
    flat = t.view(-1)
    flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1)


def configured(**fields: object) -> Callable[[Decoder], None]:
    def change(m: Decoder) -> None:
        m.config = replace(m.config, **fields)

    return change


CHANGES: dict[str, tuple[Callable[[Decoder], object], int]] = {
    "last layer": (lambda m: nudge(m.layers[-1].down.weight), -1),
    "a norm of the second": (lambda m: nudge(m.layers[1].k_norm.weight), 1),
    "first layer": (lambda m: nudge(m.layers[0].qkv.weight), 0),
    "embeddings": (lambda m: nudge(m.embed.weight), 0),
    "rotary tables": (lambda m: nudge(m.sin), 0),
    "eps": (configured(rms_norm_eps=1e-4), 0),
    "heads": (configured(num_heads=2), 0),
    "dtype": (lambda m: m.double(), 0),
    "head": (lambda m: nudge(m.head.weight), None),
    "final norm": (lambda m: nudge(m.norm.weight), None),
    "end of text": (configured(eos_ids=(1,)), None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_bit_ends_what_is_shared(change: str, model: Decoder) -> None:
    other, (apply, left) = copy.deepcopy(model), CHANGES[change]
    other.head.weight = torch.nn.Parameter(other.head.weight.clone())
    apply(other)
    n = model.config.num_layers
    want = n if left is None else left % n
    assert shared_layers([model, other]) == shared_layers([other, model]) == want


def test_vocabulary_padding_and_context_do_not_matter(model: Decoder) -> None:
    other = copy.deepcopy(model)
    more = torch.cat((model.embed.weight, torch.randn(3, model.config.hidden_size)))
    other.embed.weight = torch.nn.Parameter(more)
    other.config = replace(other.config, vocab_size=len(more), max_position=other.config.max_position // 2)
    other.cos, other.sin = (t[: other.config.max_position] for t in (other.cos, other.sin))
    assert shared_layers([model, other]) == model.config.num_layers
