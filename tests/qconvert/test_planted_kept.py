"""If one of these fails, an error in how codes are kept hides from the proof that comes with every export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from qconvert.checkpoint.computed import KeptWeights
from qconvert.checkpoint.quantised import awq
from qconvert.checkpoint.quantised.grouped import Grouped
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.formats.layout import PackedWeight
from qconvert.lowering.ort.graph import OrtGraph
from qconvert.progress import Progress
from qconvert.proof import verify
from tests.qconvert.ggufs import make_gguf
from tests.qconvert.quantising import Written, make_awq, make_gptq

LAYER = "model.layers.1.mlp.down_proj.weight"


def one_matrix(change: Callable[[PackedWeight], PackedWeight]) -> Callable[[Any], None]:
    """Plants an error in what is stored of one matrix."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = KeptWeights.__getitem__

        def wrong(weights: KeptWeights, name: str) -> PackedWeight:
            return change(right(weights, name)) if name == LAYER else right(weights, name)

        patch.setattr(KeptWeights, "__getitem__", wrong)

    return plant


def edited(tensor: torch.Tensor, edit: Callable[[torch.Tensor], None]) -> torch.Tensor:
    tensor = tensor.clone()
    edit(tensor)
    return tensor


def of_data(edit: Callable[[torch.Tensor], None]) -> Callable[[Any], None]:
    return one_matrix(lambda packed: replace(packed, data=edited(packed.data, edit)))


def of_scales(edit: Callable[[torch.Tensor], None]) -> Callable[[Any], None]:
    return one_matrix(lambda packed: replace(packed, scales=edited(packed.scales, edit)))


def of_zeros(edit: Callable[[torch.Tensor], None]) -> Callable[[Any], None]:
    return one_matrix(lambda packed: replace(packed, zero_points=edited(packed.zero_points, edit)))


def xor(place: Any, bit: int) -> Callable[[torch.Tensor], None]:
    def edit(tensor: torch.Tensor) -> None:
        tensor[place] ^= bit

    return edit


def swap_rows(tensor: torch.Tensor) -> None:
    tensor[[3, 4]] = tensor[[4, 3]]


def scale_by(tensor: torch.Tensor) -> None:
    tensor[7, 1] *= 1.001  # the next numbers of float16 are as far away


def orders_are_ignored(patch: pytest.MonkeyPatch) -> None:
    """Columns are stored as they come, behind a Gather that changes their order."""
    right = Grouped.order
    within: list[bool] = []

    def pack(matrix: Grouped) -> PackedWeight:
        within.append(True)
        try:
            return packs(matrix)
        finally:
            within.pop()

    packs = Grouped.pack
    patch.setattr(Grouped, "pack", pack)
    patch.setattr(Grouped, "order", lambda matrix: None if within else right(matrix))


def another_order(patch: pytest.MonkeyPatch) -> None:
    """Two inputs of the Gather in each other's place."""
    right = KeptWeights.order
    patch.setattr(KeptWeights, "order", lambda weights, name: swapped(right(weights, name)))


def swapped(order: torch.Tensor) -> torch.Tensor:
    order = order.clone()
    order[[0, 1]] = order[[1, 0]]
    return order


def zeros_are_one_less(patch: pytest.MonkeyPatch) -> None:
    """The 1 that version 1 of GPTQ leaves out of a zero point, forgotten while packing."""
    right = Grouped.pack

    def pack(matrix: Any) -> PackedWeight:
        matrix._first_zero -= 1
        try:
            return right(matrix)
        finally:
            matrix._first_zero += 1

    patch.setattr(Grouped, "pack", pack)


def awq_s_order_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(awq, "_OUTPUT_OF_PLACE", tuple(range(8)))


ORDERED = {"desc_act": True, "symmetric": False}
PLANTED: dict[str, tuple[Callable[..., Written], dict[str, Any], Callable[[Any], None]]] = {
    "one code off by one": (make_gptq, ORDERED, of_data(xor((0, 0, 0), 1))),
    "the highest bit of the last code": (make_gptq, {}, of_data(xor((-1, -1, -1), 0x80))),
    "one zero point off by one": (make_gptq, ORDERED, of_zeros(xor((9, 0), 1))),
    "all zero points off by one": (make_gptq, ORDERED, zeros_are_one_less),
    "the last bit of one scale": (make_gptq, ORDERED, of_scales(scale_by)),
    "two rows in each other's place": (make_gptq, {}, of_data(swap_rows)),
    "orders of inputs ignored": (make_gptq, ORDERED, orders_are_ignored),
    "two inputs in each other's place": (make_gptq, ORDERED, another_order),
    "8 bits: one code off by one": (make_gptq, {"bits": 8}, of_data(xor((5, 1, 7), 1))),
    "awq's order of outputs ignored": (make_awq, {}, awq_s_order_is_ignored),
    "awq: one zero point off by one": (make_awq, {}, of_zeros(xor((2, 1), 0x10))),
}


def of_residuals(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return one_matrix(lambda packed: replace(packed, residuals=change(packed.residuals)))


def gguf(root: Path, kind: str) -> Path:
    return make_gguf(root / "files", "qwen2", kind)[1]


RESIDUALS: dict[str, Callable[[Any], None]] = {
    "residuals with the wrong sign": of_residuals(torch.neg),
    "residuals of the neighbouring block": of_residuals(lambda found: found.roll(1, 1)),
    "residuals of the neighbouring row": of_residuals(lambda found: found.roll(1, 0)),
    "residuals left out": of_residuals(torch.zeros_like),
    "one residual left out": of_residuals(lambda found: edited(found, lambda each: each[3, 2].zero_())),
    "one residual in half precision": of_residuals(
        lambda found: edited(found, lambda each: each[3, 2].mul_(1 + 2**-20))
    ),
    "one zero point off by one": of_zeros(xor((9, 0), 1)),
}


@pytest.mark.parametrize("bits", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_planted_error_in_residuals_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bits: str
) -> None:
    path = gguf(tmp_path, bits)
    RESIDUALS[kind](monkeypatch)
    with pytest.raises(QconvertError, match="the checkpoint's own codes give"):
        export(str(path), ExportOptions(output=tmp_path / "out"), Progress(quiet=True))
    assert not (tmp_path / "out").exists()


def of_operator(op_type: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """Plants an error in how down_proj of the last layer is multiplied."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = OrtGraph.op

        def wrong(graph: OrtGraph, kind: str, inputs: Any, *rest: Any, **named: Any) -> ir.Value:
            if kind == op_type and named.get("name") == LAYER:
                return change(partial(right, graph), kind, list(inputs), *rest, **named)
            return right(graph, kind, inputs, *rest, **named)

        patch.setattr(OrtGraph, "op", wrong)

    return plant


def subtracted(op: Any, _: str, inputs: Any, *rest: Any, **named: Any) -> ir.Value:
    return op("Sub", inputs, *rest, **named)


def left_out(op: Any, kind: str, inputs: Any, *rest: Any, **named: Any) -> ir.Value:
    return op("Identity", inputs[:1], **named)


def twice(op: Any, kind: str, inputs: Any, *rest: Any, **named: Any) -> ir.Value:
    return op("Add", [op("Add", inputs, **named), inputs[1]], **named)


def of_others(op: Any, kind: str, inputs: Any, *rest: Any, **named: Any) -> ir.Value:
    return op(kind, [op("Neg", inputs[:1], **named), *inputs[1:]], *rest, **named)


def other_blocks(patch: pytest.MonkeyPatch) -> None:
    """Features whose places differ by the number of blocks are added up, not 32 that follow each other."""
    right = OrtGraph.constant

    def wrong(graph: OrtGraph, name: str, value: Any) -> ir.Value:
        if name.endswith("_blocks_of_32"):
            value = [0, 0, 32, value[2]]
        return right(graph, name, [-2] if name == "features_axis" else value)

    patch.setattr(OrtGraph, "constant", wrong)


OPERATORS: dict[str, tuple[Callable[[Any], None], str]] = {
    "subtracted": (of_operator("Add", subtracted), "residuals is not added to the product"),
    "left out": (of_operator("Add", left_out), "residuals is not added to the product"),
    "added twice": (of_operator("Add", twice), "sharp twin"),
    "of other features": (of_operator("Reshape", of_others), "not multiplied with sums of the product's own"),
    "over the wrong 32": (other_blocks, "_blocks_of_32: the constant is"),
}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", OPERATORS)
def test_a_planted_error_in_how_residuals_are_added_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, checked: bool
) -> None:
    """Read in the graph; and where that is not looked at, seen in the logits of its sharp twin."""
    path = gguf(tmp_path, "Q4_1")
    plant, said = OPERATORS[kind]
    plant(monkeypatch)
    if not checked:
        monkeypatch.setattr(verify, "check_graphs", lambda *_: [])
        monkeypatch.setattr(verify, "check_inventory", lambda *_: [])
    with pytest.raises(QconvertError, match=said if checked else "sharp twin"):
        export(str(path), ExportOptions(output=tmp_path / "out"), Progress(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make, settings, plant = PLANTED[kind]
    make(tmp_path / "model", **settings)
    plant(monkeypatch)
    with pytest.raises(QconvertError, match="the checkpoint's own codes give"):
        export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out"), Progress(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
