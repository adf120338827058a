"""If one of these fails, an error in how codes are kept hides from the proof that comes with every export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert.checkpoint.computed import KeptWeights
from qconvert.checkpoint.quantised import awq
from qconvert.checkpoint.quantised.grouped import Grouped
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.formats.layout import PackedWeight
from qconvert.progress import Progress
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


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make, settings, plant = PLANTED[kind]
    make(tmp_path / "model", **settings)
    plant(monkeypatch)
    with pytest.raises(QconvertError, match="the checkpoint's own codes give"):
        export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out"), Progress(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
