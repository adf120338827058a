"""Kinds in what a graph holds: constants, tables of angles, stored weights, scales of the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qconvert.formats.stored import kv_scale_name
from tests.qconvert.mutants import attentions, reseal
from tests.qconvert.planted.edits import (
    LAYER,
    DoesNotApplyError,
    Plant,
    as_float16,
    constant,
    in_bytes,
    in_graph,
    initializer,
    rewrite,
    stored,
    use_instead,
)

Change = Callable[[NDArray[Any]], NDArray[Any]]
_LAYER = f"model.layers.{LAYER}"


def to(value: Any) -> Change:
    """A constant becomes another."""
    return lambda array: np.full_like(array, value)


def table(change: Change, *names: str) -> Plant:
    """The tables of angles become others, of any shape; they stand in the graph then."""

    def edit(graph: ir.Graph) -> None:
        for name in names or ("cos_cache", "sin_cache"):
            old = initializer(graph, name)
            assert old.const_value is not None
            rows = change(np.array(old.const_value.numpy()))
            del graph.initializers[name]
            new = constant(graph, name, rows, rows.dtype)
            use_instead(old, new)

    return in_graph(edit)


def first_half(rows: NDArray[Any]) -> NDArray[Any]:
    return rows[: len(rows) // 2]


def far_angles(rows: NDArray[Any]) -> NDArray[Any]:
    """Wrong in the last tenth of the context, where no text of a proof comes near in a real model."""
    rows[-len(rows) // 10 :] = rows[: -(-len(rows) // 10)]
    return rows


def angles_one_late(rows: NDArray[Any]) -> NDArray[Any]:
    return np.roll(rows, 1, axis=0)


def byte(place: int, bits: int) -> Change:
    """Some bits of one byte flipped."""

    def change(array: NDArray[Any]) -> NDArray[Any]:
        flat = array.view(np.uint8).reshape(-1)
        flat[place] ^= bits
        return array

    return change


def row_times(factor: float) -> Change:
    """The numbers of one row, or one of a vector's, multiplied."""

    def change(array: NDArray[Any]) -> NDArray[Any]:
        array[5] = array[5] * factor
        return array

    return change


def rows_moved(array: NDArray[Any]) -> NDArray[Any]:
    return np.roll(array, 1, axis=0)


def nibbles_exchanged(array: NDArray[Any]) -> NDArray[Any]:
    array[5] = (array[5] >> 4) | (array[5] << 4)
    return array


def transposed(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise DoesNotApplyError
    return array.T


def part_of_bias(part: str, change: Change) -> Plant:
    """The bias of q, k or v, which stand side by side."""

    def plant(folder: Path) -> None:
        cos = ir.load(folder / "model.onnx").graph.initializers["cos_cache"].const_value
        assert cos is not None
        name = f"{_LAYER}.self_attn.q_k_v_proj.bias"
        heads, kv_heads = _heads(folder)
        ends = np.cumsum([0, heads, kv_heads, kv_heads]) * 2 * int(cos.shape.numpy()[1])
        begin, end = ends["qkv".index(part)], ends["qkv".index(part) + 1]

        def edit(array: NDArray[Any]) -> NDArray[Any]:
            array[begin:end] = change(array[begin:end])
            return array

        rewrite(folder, name, edit)

    return plant


def _heads(folder: Path) -> tuple[int, int]:
    node = attentions(ir.load(folder / "model.onnx").graph)[0]
    return node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()


def exchanged_with_next_layer(name: str, *, all_parts: bool = False) -> Plant:
    """What is stored for two layers stands in each other's place."""

    def plant(folder: Path) -> None:
        names = [found for found in stored(folder, "") if found.startswith(f"{_LAYER}.{name}")]
        if not names:
            raise DoesNotApplyError
        graph = ir.load(folder / "model.onnx").graph
        for mine in names if all_parts else names[:1]:
            other = mine.replace(f"layers.{LAYER}.", f"layers.{LAYER + 1}.")
            one, two = (np.array(graph.initializers[each].const_value.numpy()) for each in (mine, other))  # type: ignore[union-attr]
            rewrite(folder, mine, lambda _, value=two: value)  # type: ignore[misc]
            rewrite(folder, other, lambda _, value=one: value)  # type: ignore[misc]

    return plant


def offsets_exchanged(first: str, second: str) -> Plant:
    """Two tensors of one size find each other's bytes in the data file."""

    def edit(graph: ir.Graph) -> None:
        one, other = (
            next((value for name, value in graph.initializers.items() if name.startswith(part)), None)
            for part in (first, second)
        )
        if one is None or other is None:
            raise DoesNotApplyError
        assert isinstance(one.const_value, ir.ExternalTensor)
        assert isinstance(other.const_value, ir.ExternalTensor)
        if one.const_value.shape != other.const_value.shape:
            raise DoesNotApplyError
        one.const_value, other.const_value = (
            _moved(to, name) for to, name in ((other.const_value, one.name), (one.const_value, other.name))
        )

    return in_graph(edit)


def _moved(tensor: ir.ExternalTensor, name: str | None, by: int = 0) -> ir.ExternalTensor:
    assert tensor.offset is not None
    assert name is not None
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset + by,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,  # type: ignore[arg-type]
        name=name,
        base_dir=tensor.base_dir,
    )


def embedding_one_row_late(graph: ir.Graph) -> None:
    """Each look-up reads the row after its own: the table begins one row too late in the data file."""
    name = next(
        (
            name
            for name in ("model.embed_tokens.weight", "model.embed_tokens.weight.q8.rows")
            if name in graph.initializers
        ),
        None,
    )
    if name is None:
        raise DoesNotApplyError
    value = graph.initializers[name]
    assert isinstance(value.const_value, ir.ExternalTensor)
    row = value.const_value.nbytes // value.const_value.shape[0]
    value.const_value = _moved(value.const_value, name, int(row))


def every_kv_scale(part: str, factor: float, graph: str = "model.onnx") -> Plant:
    """The scales of an int8 cache in all layers; in both graphs, so that these agree."""

    def plant(folder: Path) -> None:
        names = list(stored(folder, f"{part}_scale", graph))
        if not names:
            raise DoesNotApplyError
        for file in ("model.onnx", "prefill.onnx"):
            if (folder / file).is_file():
                for name in names:
                    rewrite(folder, name, lambda scales: scales * factor, file)

    return plant


def one_kv_scale(array: NDArray[Any]) -> NDArray[Any]:
    array[0, 0, 0, 3] *= 1.1
    return array


def _without_record(folder: Path) -> None:
    record = folder / "rounding.json"
    if not record.is_file():
        raise DoesNotApplyError
    record.write_text('{"float32_sha256": {}}', encoding="utf-8")
    reseal(folder)


CONSTANTS: dict[str, Plant] = {
    "logits end at position 4,096": in_bytes("positions_end", to(4096)),
    "the last position's logits by default": in_bytes("logits_start", to(-1)),
    "attention by groups by default": in_bytes("attend_by_groups", to(True)),
    "by groups: what is hidden is only a little less likely": in_bytes("by_groups_hidden", to(-20)),
    "activations in 120ths": in_bytes("one_127th", to(1 / 120)),
    "activations in 130ths": in_bytes("one_127th", to(1 / 130)),
    "activations about 127": in_bytes("activation_zero_point", to(127)),
    "small activations rounded away": in_bytes("smallest_scale", to(0.01)),
    "upper halves 15 times as large": in_bytes("upper_half", to(15)),
    "a shortlist of half the size": in_bytes("shortlist_size", lambda size: size // 2),
    "second step for the tokens behind": in_bytes("shortlist_starts", lambda starts: starts + 1),
    "angles for half of the context": table(first_half),
    "sines for half of the context": table(first_half, "sin_cache"),
    "wrong angles in the last tenth of the context": table(far_angles),
    "angles one position late": table(angles_one_late),
    "angles rounded to float16": table(lambda rows: as_float16(rows).astype(rows.dtype)),
    "sines with the other sign": table(lambda rows: -rows, "sin_cache"),
}

STORED: dict[str, Plant] = {
    "one code of a matrix": in_bytes(f"{_LAYER}.mlp.down_proj.weight.q4", byte(777, 0x40)),
    "one code of a matrix of integers": in_bytes(f"{_LAYER}.self_attn.o_proj.weight.int8", byte(777, 0x20)),
    "one weight in float32": in_bytes(f"{_LAYER}.mlp.down_proj.weight", byte(4 * 777 + 2, 0x08)),
    "a row's scales 10% off": in_bytes(f"{_LAYER}.mlp.up_proj.weight.scales", row_times(1.1)),
    "a channel's scale 10% off": in_bytes(
        f"{_LAYER}.self_attn.q_k_v_proj.weight.int8_scales", row_times(1.1)
    ),
    "scales in the next row's place": in_bytes(f"{_LAYER}.mlp.up_proj.weight.scales", rows_moved),
    "a zero point off by one": in_bytes(f"{_LAYER}.mlp.gate_proj.weight.zero_points", byte(7, 0x01)),
    "nibbles of a row exchanged": in_bytes(f"{_LAYER}.mlp.gate_proj.weight.q4", nibbles_exchanged),
    "a matrix transposed": in_bytes(f"{_LAYER}.self_attn.o_proj.weight", transposed),
    "codes of a matrix transposed": in_bytes(f"{_LAYER}.self_attn.o_proj.weight.int8", transposed),
    "rows of the embedding one late": in_graph(embedding_one_row_late),
    "the embedding's scales in the next row's place": in_bytes(
        "model.embed_tokens.weight.scales", rows_moved
    ),
    "a row of the head zero": in_bytes("lm_head.weight", row_times(0.0)),
    "a row of the head with the other sign": in_bytes("lm_head.weight.scales", row_times(-1.0)),
    "lower halves of a row of the head lost": in_bytes("lm_head.weight.lower", row_times(0.0)),
    "a norm applied twice": in_bytes(f"{_LAYER}.input_layernorm.weight", lambda norm: norm * norm),
    "a norm 5% too strong": in_bytes(f"{_LAYER}.post_attention_layernorm.weight", lambda norm: norm * 1.05),
    "the last norm in another order": in_bytes("model.norm.weight", rows_moved),
    "bias of q left out": part_of_bias("q", np.zeros_like),
    "bias of k left out": part_of_bias("k", np.zeros_like),
    "bias of v left out": part_of_bias("v", np.zeros_like),
    "biases of two layers exchanged": exchanged_with_next_layer("self_attn.q_k_v_proj.bias"),
    "norms of two layers exchanged": exchanged_with_next_layer("input_layernorm"),
    "matrices of two layers exchanged": exchanged_with_next_layer("self_attn.o_proj.weight", all_parts=True),
    "two layers exchanged": exchanged_with_next_layer("", all_parts=True),
    "places in the data file exchanged": offsets_exchanged(
        f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"
    ),
}

CACHE: dict[str, Plant] = {
    "one scale of keys 10% off": in_bytes(kv_scale_name(LAYER, "key"), one_kv_scale),
    "all scales of keys 10% too large": every_kv_scale("key", 1.1),
    "all scales of values 10% too small": every_kv_scale("value", 1 / 1.1),
    "all scales of values doubled": every_kv_scale("value", 2.0),
    "scales of two layers' values exchanged": exchanged_with_next_layer("self_attn.value_scale"),
    "the calibration's record lost": _without_record,
}
