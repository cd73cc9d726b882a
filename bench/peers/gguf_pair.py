"""GGUF files of the smol pair for the peers that read nothing else: the same bf16 weights, its first layers or all.

python -m bench.peers.gguf_pair SOURCE.gguf OUT.gguf --layers 8 --dtype F16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def write(source: Path, out: Path, layers: int, dtype: str) -> None:
    """`source` with its matrices dequantised, rounded to bf16 and stored as `dtype` (F16 or BF16)."""
    import gguf

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, arch)
    kind = gguf.GGMLQuantizationType[dtype]
    replaced = {
        f"{arch}.block_count": layers,
        "general.file_type": int(gguf.LlamaFileType[f"MOSTLY_{dtype}"]),
    }
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = replaced.get(name, field.contents())
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        data = bf16_rounded(gguf.dequantize(tensor.data, tensor.tensor_type))
        if data.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(out)


def bf16_rounded(x: np.ndarray) -> np.ndarray:
    """float32 values that bf16 can hold, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--dtype", choices=["F16", "BF16"], default="F16")
    args = parser.parse_args()
    write(args.source, args.out, args.layers, args.dtype)


if __name__ == "__main__":
    main()
