"""GGUF files for the peers hold the bf16 weights of the layers asked for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bench.peers import gguf_pair


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b", "c"])
    writer.add_rope_freq_base(1e5)
    rng = np.random.default_rng(0)
    for name in ("token_embd.weight", *(f"blk.{i}.ffn_up.weight" for i in range(3))):
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quantize(rng.normal(size=(8, 64)).astype(np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", rng.normal(size=64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_first_layers_in_another_type(source: Path, dtype: str) -> None:
    out = source.with_name("out.gguf")
    gguf_pair.write(source, out, 2, dtype)
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(out)
    assert new.fields["llama.block_count"].contents() == 2
    assert new.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "c"]
    assert new.fields["llama.rope.freq_base"].contents() == pytest.approx(1e5)
    originals = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in old.tensors}
    assert {t.name for t in new.tensors} == {n for n in originals if "blk.2" not in n}
    for t in new.tensors:
        rounded = torch.tensor(originals[t.name]).bfloat16().float().numpy()
        assert np.array_equal(gguf.dequantize(t.data, t.tensor_type), rounded)
        assert t.tensor_type.name == (dtype if t.data.ndim > 1 else "F32")


def test_rounding_is_that_of_torch() -> None:
    x = torch.randn(4096) * torch.logspace(-20, 20, 4096)
    half_way = torch.tensor([1.00390625, 1.01171875])  # ties go to even
    x = torch.cat((x, half_way, -half_way))
    assert np.array_equal(gguf_pair.bf16_rounded(x.numpy()), x.bfloat16().float().numpy())
