"""A Qwen2 or Qwen3 checkpoint as an unquantised GGUF file, with the ``gguf`` package and NumPy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map


def write_gguf(checkpoint: Path, target: Path) -> None:
    """bfloat16 stays bfloat16, float32 stays float32; vectors become float32, as llama.cpp wants them."""
    config = json.loads((checkpoint / "config.json").read_text())
    family = config["model_type"]
    writer = GGUFWriter(str(target), family)
    add_metadata(writer, config)
    names = get_tensor_name_map(MODEL_ARCH[family.upper()], config["num_hidden_layers"])
    for name, kind, values in checkpoint_tensors(checkpoint):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise SystemExit(f"GGUF has no name for {name}")
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name, as_float32(kind, values))
        else:
            assert kind == "BF16", f"{name}: {kind} is not written by this program"
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(gguf_name, raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp needs to know of the family. No tokenizer: the benchmarks speak token ids."""
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if (head_size := config.get("head_dim")) is not None:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def checkpoint_tensors(checkpoint: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, safetensors type and values of every tensor, mapped and not read; bfloat16 as uint16."""
    kinds = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                values = data[start:end].view(kinds[entry["dtype"]]).reshape(entry["shape"])
                yield name, entry["dtype"], values


def as_float32(kind: str, values: np.ndarray) -> np.ndarray:
    """Exact float32 values of a tensor that was read by ``checkpoint_tensors``."""
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
