"""If one of these fails, a checkpoint that is quantised becomes another model, or is rounded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from tests.qconvert.quantising import Rounded, Written, make_awq, make_gptq

QUIET = Progress(quiet=True)
Make = Callable[[Path], Written]
# Every row of docs/quantised.md's table.
KINDS: dict[str, tuple[Callable[..., Written], dict[str, Any]]] = {
    "gptq: 4 bits, symmetric": (make_gptq, {}),
    "gptq: 4 bits": (make_gptq, {"symmetric": False}),
    "gptq: 8 bits, symmetric": (make_gptq, {"bits": 8}),
    "gptq: 8 bits": (make_gptq, {"bits": 8, "symmetric": False}),
    "gptq: zero points as they are": (make_gptq, {"symmetric": False, "version": 2}),
    "gptq: symmetric, zero points as they are": (make_gptq, {"version": 2}),
    "gptq: groups of 64": (make_gptq, {"group": 64}),
    "gptq: one group a row": (make_gptq, {"group": -1, "symmetric": False}),
    "gptq: longer than blocks": (make_gptq, {"group": 512, "symmetric": False, "intermediate_size": 1024}),
    "gptq: groups of three blocks": (make_gptq, {"group": 96, "intermediate_size": 288, "hidden_size": 192}),
    "gptq: an order of inputs": (make_gptq, {"desc_act": True, "symmetric": False}),
    "gptq: an order of inputs, 8 bits": (make_gptq, {"desc_act": True, "bits": 8}),
    "gptq: biases of zeros": (make_gptq, {"bias_of_zeros": True}),
    "gptq: a head of its own": (make_gptq, {"tie_word_embeddings": False}),
    "gptq: a quantised head": (make_gptq, {"tie_word_embeddings": False, "head": True, "desc_act": True}),
    "gptq: v_proj in floats": (make_gptq, {"skip": "v_proj"}),
    "gptq: an order for each matrix": (make_gptq, {"desc_act": True, "own_orders": True}),
    "awq": (make_awq, {}),
    "awq: symmetric": (make_awq, {"symmetric": True}),
    "awq: groups of 64": (make_awq, {"group": 64}),
    "awq: one group a row": (make_awq, {"group": -1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_what_its_writer_meant(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    written = make(tmp_path, **settings)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.computed) == set(written)
    weights = CheckpointWeights(load_model(checkpoint))
    for name, matrix in written.items():
        assert torch.equal(weights[name], matrix.floats), name
        weights.release(name)
        rows = torch.tensor([5, 0, 9])
        assert torch.equal(weights.rows(name, rows), matrix.floats[rows]), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_exported_with_its_own_codes(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    written = make(tmp_path / "model", **settings)
    exported = export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out"), QUIET)
    assert exported.report is not None
    assert exported.report.passed
    assert exported.report.precision == "kept"
    found = stored(exported.folder)
    assert set(found) == set(written)
    for name, matrix in written.items():
        same_codes(found[name], matrix)


def same_codes(found: Rounded, matrix: Rounded) -> None:
    """Bit for bit: codes, and the scale and zero point of every weight."""
    assert np.array_equal(found.codes, matrix.codes)
    assert found.scales.dtype == matrix.scales.dtype
    assert np.array_equal(found.scales[:, found.groups], matrix.scales[:, matrix.groups])
    assert np.array_equal(found.zeros[:, found.groups], matrix.zeros[:, matrix.groups])


def stored(folder: Path) -> Written:
    """The matrices of an export's products in blocks, read here as ONNX Runtime documents them."""
    graph = ir.load(folder / "model.onnx").graph
    found: Written = {}
    for node in graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
        columns, rows = (node.attributes[name].as_int() for name in ("K", "N"))
        data, scales = (node.inputs[index] for index in (1, 2))
        if scales.producer() is not None:  # cast to float32
            scales = scales.producer().inputs[0]
        codes = fields(data.const_value.numpy().reshape(rows, -1), bits)[:, :columns]
        scales = scales.const_value.numpy()
        zeros = np.full(scales.shape, 1 << (bits - 1))
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            zeros = fields(node.inputs[3].const_value.numpy(), bits)[:, : scales.shape[1]]
        groups = np.arange(columns) // size
        gather = node.inputs[0].producer()
        if gather is not None and gather.op_type == "Gather":
            order = gather.inputs[1].const_value.numpy()
            codes, groups = codes[:, np.argsort(order)], groups[np.argsort(order)]
        first = 0
        for name, count in parts(data.name, rows):
            part = slice(first, first + count)
            found[name] = Rounded(codes[part], scales[part], zeros[part], groups)
            first += count
    return found


def fields(packed: np.ndarray, bits: int) -> np.ndarray:
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)


def parts(name: str, rows: int) -> list[tuple[str, int]]:
    name = name.rsplit(".", 1)[0].removesuffix(".weight")
    if name.endswith("q_k_v_proj"):  # four query heads and two of keys and of values
        sizes = zip("qkv", (rows // 2, rows // 4, rows // 4))
        return [(f"{name.removesuffix('q_k_v_proj')}{part}_proj.weight", size) for part, size in sizes]
    return [(f"{name}.weight", rows)]


def test_matrices_that_read_one_input_in_one_order_share_a_gather(tmp_path: Path) -> None:
    make_gptq(tmp_path / "model", desc_act=True)
    options = ExportOptions(output=tmp_path / "out", verify=False)
    graph = ir.load(export(str(tmp_path / "model"), options, QUIET).folder / "model.onnx").graph
    gathers = [node for node in graph if node.op_type == "Gather" and "axis" in node.attributes]
    in_order = [node for node in gathers if node.attributes["axis"].as_int() == -1]
    # q, k and v together, o, gate and up together, down: in each of two layers.
    assert len(in_order) == 8
    assert sum(len(node.outputs[0].uses()) for node in in_order) == 10
