"""If these fail, a graph that TensorRT would build wrongly without a word reaches its builder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.tensorrt.traps import check_graph, check_scales
from tests.qconvert.building import TinyExports, dynamic_cache, edit_graph


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def upper_left(model: ir.Model) -> None:
    first(model, "TRT_Attention").attributes["causal_kind"] = ir.AttrString("causal_kind", "upper_left")


def no_length(model: ir.Model) -> None:
    first(model, "TRT_Attention").replace_input_with(5, None)


def float32_attention(model: ir.Model) -> None:
    node = first(model, "TRT_Attention")
    assert node.inputs[0] is not None
    node.inputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast = node.inputs[0].producer()
    assert cast is not None
    cast.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))


def unsigned_weights(model: ir.Model) -> None:
    value = first(model, "DequantizeLinear").inputs[0]
    assert value is not None
    old = value.const_value
    assert isinstance(old, ir.ExternalTensor)
    assert old.shape is not None
    value.type = ir.TensorType(ir.DataType.UINT4)
    value.const_value = ir.ExternalTensor(
        old.location, old.offset, old.length, ir.DataType.UINT4, shape=old.shape, name=str(value.name)
    )


def zero_points(model: ir.Model) -> None:
    node = first(model, "DequantizeLinear")
    node.resize_inputs(3)
    node.replace_input_with(2, node.inputs[1])


def other_axis(model: ir.Model) -> None:
    first(model, "DequantizeLinear").attributes["axis"] = ir.AttrInt64("axis", 1)


@pytest.mark.parametrize(
    ("precision", "trap", "message"),
    [
        ("bf16", dynamic_cache, "dynamic length"),
        ("bf16", upper_left, "from the upper left"),
        ("bf16", no_length, "the keys have no length"),
        ("bf16", float32_attention, "attention in FLOAT"),
        ("int4", unsigned_weights, "weights in UINT4"),
        ("int4", zero_points, "zero points"),
        ("int4", other_axis, "along the first axis"),
    ],
)
def test_the_check_notices_each_trap_and_our_export_has_none(
    exported: TinyExports,
    tmp_path: Path,
    precision: str,
    trap: Callable[[ir.Model], None],
    message: str,
) -> None:
    folder = Path(shutil.copytree(exported(precision), tmp_path / "model"))
    check_graph(folder / "model.onnx")
    edit_graph(folder, trap)
    with pytest.raises(QconvertError, match=f"/model/layers.*{message}"):
        check_graph(folder / "model.onnx")


@pytest.mark.parametrize("scale", [0.0, -0.01])
def test_a_scale_that_the_parser_refuses_is_told_before_the_build(
    exported: TinyExports, tmp_path: Path, scale: float
) -> None:
    folder = Path(shutil.copytree(exported("int4"), tmp_path / "model"))
    check_scales(folder / "model.onnx")

    def spoil(model: ir.Model) -> None:
        value = first(model, "DequantizeLinear").inputs[1]
        assert value is not None
        assert value.const_value is not None
        scales = np.array(value.const_value.numpy())
        scales.flat[-1] = scale
        value.const_value = ir.tensor(scales, name=value.name)

    edit_graph(folder, spoil)
    with pytest.raises(QconvertError, match="one matrix has scales that are not positive"):
        check_scales(folder / "model.onnx")


def test_codes_of_q4_0_have_scales_of_either_sign(tmp_path: Path) -> None:
    source = Path(__file__).parent / "data" / "gguf" / "llama-Q4_0.gguf"
    chosen = ExportOptions(None, target="tensorrt", output=tmp_path / "m", verify=False)
    export(str(source), chosen, Progress(quiet=True))
    check_graph(tmp_path / "m" / "model.onnx")
    with pytest.raises(QconvertError, match="as codes of GGUF's Q4_0 have") as refused:
        check_scales(tmp_path / "m" / "model.onnx")
    assert "--precision int4" in str(refused.value.hint)
    again = ExportOptions("int4", target="tensorrt", output=tmp_path / "again", verify=False)
    export(str(source), again, Progress(quiet=True))
    check_scales(tmp_path / "again" / "model.onnx")


def test_bytes_that_are_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    for check in (check_graph, check_scales):
        with pytest.raises(QconvertError, match="not an ONNX graph"):
            check(tmp_path / "model.onnx")
