"""GGUF files of tiny checkpoints: named and permuted as llama.cpp's converter does it, with a tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray
from safetensors.numpy import load_file

from qconvert.checkpoint.gguf.container import open_container
from tests.tiny import make_tiny_checkpoint

# Pairs of letters (as byte-level vocabularies spell bytes) that are tokens, the second of ones before it.
MERGES = ("t h", "th e", "\u0120 the", "i n", "\u0120 a", "\u00c3 \u00a9")
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_TYPE_NORMAL, _TYPE_CONTROL, _TYPE_UNUSED = 1, 3, 5


def make_gguf(root: Path, family: str = "qwen2", kind: str = "F32", **settings: Any) -> tuple[Path, Path]:
    """A tiny checkpoint with a tokenizer that merges, and its GGUF file with matrices of one type."""
    folder = make_tiny_checkpoint(root / f"{family}-original", family=family, **settings)
    add_merges(folder)
    path = root / f"{family}-{kind}.gguf"
    write_gguf(folder, path, kind)
    return folder, path


def add_merges(folder: Path) -> None:
    """Tokens of several bytes behind the tiny tokenizer's special tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    for merge in MERGES:
        vocab[merge.replace(" ", "")] = 259 + MERGES.index(merge)
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"]["merges"] = [merge.split(" ") for merge in MERGES]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    *,
    more: Mapping[str, Any] | None = None,
    without: str = "",
    rule: str = "gpt-2",
) -> None:
    """A checkpoint as one GGUF file.

    Args:
        folder: the checkpoint.
        path: the file.
        kind: the type of its matrices; vectors are F32.
        more: entries beside or in place of the usual ones: a value with a method of ``GGUFWriter``.
        without: the name of a tensor that is left out.
        rule: llama.cpp's name of how a text is cut before it is merged.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(str(path), config["model_type"])
    _add_sizes(writer, config)
    _add_vocabulary(writer, folder, config["vocab_size"], rule)
    for key, (method, value) in (more or {}).items():
        getattr(writer, method)(key, value)
    for name, stored in load_file(folder / "model.safetensors").items():
        called = gguf_name(name)
        if called == without:
            continue
        values = permuted(name, stored.astype(np.float32), config)
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(called, values)
        else:
            chosen = GGMLQuantizationType[kind]
            writer.add_tensor(called, quants.quantize(values, chosen), raw_dtype=chosen)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config["head_dim"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF files."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part, ending = rest.rsplit(".", 1)
    return f"blk.{layer}.{_INNER[part]}.{ending}"


def permuted(name: str, values: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """Rows of q and k as llama.cpp's Llama has them (``LlamaModel.permute`` of its converter)."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    split = values.reshape(heads, 2, len(values) // heads // 2, -1)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def llama3_factors(rope: Mapping[str, Any], head_size: int) -> NDArray[np.float32]:
    """By what frequencies are divided (``generate_extra_tensors`` of llama.cpp's converter)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, found = rope["original_max_position_embeddings"], []
    for index in range(0, head_size, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (index / head_size)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, dtype=np.float32)


def _add_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: GGUFWriter, folder: Path, size: int, rule: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    special = {token["id"] for token in content["added_tokens"]}
    tokens = [ids.get(token_id, f"[PAD{token_id}]") for token_id in range(size)]
    types = [
        _TYPE_CONTROL if token_id in special else _TYPE_NORMAL if token_id in ids else _TYPE_UNUSED
        for token_id in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    named = {token: token_id for token_id, token in ids.items()}
    writer.add_eos_token_id(named[settings["eos_token"]])
    writer.add_pad_token_id(named[settings["pad_token"]])
    writer.add_chat_template(settings["chat_template"])


def split(path: Path, target: Path, count: int) -> None:
    """As llama.cpp's gguf-split does it: the first part has all entries, and all parts say which they are."""
    content = path.read_bytes()
    file = open_container(path)
    names = list(file.tensors)
    entries_end = _entries_end(content, names[0])
    target.parent.mkdir(exist_ok=True)
    for number in range(count):
        mine = names[number::count]
        parts = [
            ("split.no", 2, "H", number),
            ("split.count", 2, "H", count),
            ("split.tensors.count", 5, "i", len(names)),
        ]
        entries = b"".join(
            struct.pack("<Q", len(key)) + key.encode() + struct.pack(f"<I{form}", kind, value)
            for key, kind, form, value in parts
        )
        (known,) = struct.unpack_from("<Q", content, 16)
        head = struct.pack("<4sIQQ", b"GGUF", 3, len(mine), len(parts) + (known if number == 0 else 0))
        head += (content[24:entries_end] if number == 0 else b"") + entries
        data = b""
        for name in mine:
            stored = file.tensors[name]
            head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(stored.shape))
            head += struct.pack(f"<{len(stored.shape)}Q", *stored.shape[::-1])
            head += struct.pack("<IQ", int(stored.kind), len(data))
            data += content[stored.start : stored.start + stored.size]
            data += bytes(-len(data) % 32)
        head += bytes(-len(head) % 32)
        target.with_name(f"{target.name}-{number + 1:05}-of-{count:05}.gguf").write_bytes(head + data)


def _entries_end(content: bytes, first: str) -> int:
    """Where the entries of a file end: before the name of its first tensor."""
    return content.index(struct.pack("<Q", len(first)) + first.encode())
