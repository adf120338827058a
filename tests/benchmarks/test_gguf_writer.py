"""The GGUF file that llama.cpp gets: a wrong name or type there is an unfair comparison, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.tiny import make_tiny_checkpoint


def test_a_qwen3_is_one(tmp_path: Path) -> None:
    """Its heads are normed and have a width of their own: without both llama.cpp computes another model."""
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers.gguf_writer import write_gguf

    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", family="qwen3")
    write_gguf(checkpoint, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "qwen3"
    assert reader.fields["qwen3.attention.key_length"].contents() == 32
    assert reader.fields["qwen3.attention.value_length"].contents() == 32
    assert len(reader.tensors) == len(load_file(checkpoint / "model.safetensors"))
    assert {f"blk.{layer}.attn_{each}_norm.weight" for layer in range(3) for each in "qk"} <= {
        tensor.name for tensor in reader.tensors
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_arrives_with_its_values(tmp_path: Path, dtype: str) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers.gguf_writer import write_gguf

    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    write_gguf(checkpoint, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    source = load_file(checkpoint / "model.safetensors")
    assert len(found) == len(source)
    assert reader.fields["general.architecture"].contents() == "qwen2"
    assert reader.fields["qwen2.attention.head_count_kv"].contents() == 2
    assert reader.fields["qwen2.rope.freq_base"].contents() == 10_000.0

    def values(name: str) -> np.ndarray:
        tensor = found[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    for layer in range(3):
        for theirs, ours in (
            ("attn_q.weight", "self_attn.q_proj.weight"),
            ("attn_k.bias", "self_attn.k_proj.bias"),
        ):
            expected = source[f"model.layers.{layer}.{ours}"].float().numpy()
            np.testing.assert_array_equal(values(f"blk.{layer}.{theirs}"), expected)
    assert found["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(
        values("token_embd.weight"), source["model.embed_tokens.weight"].float().numpy()
    )
