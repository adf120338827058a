"""If these fail, an error in a finished export hides behind the rounding of 8 or 4 bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof.verify import failures_one_by_one
from tests.qconvert.mutants import edit_graph
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)
COLUMNS = {
    "fp32": ("fp32", {}),
    "int8": ("int8", {}),
    "int8, int8 cache": ("int8", {"int8_kv_cache": True}),
    "int4": ("int4", {}),
    "int4 gptq": ("int4", {"recipe": "gptq"}),
    "int4, prefill, int8 cache": ("int4", {"prefill": True, "int8_kv_cache": True}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    settings = {"vocab_size": 4096, "tie_word_embeddings": False}
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("c") / "tiny", sliding=True, **settings)
    return path, Reference(load_model(open_checkpoint(path)))


@pytest.fixture(scope="module", params=COLUMNS)
def made(
    request: pytest.FixtureRequest,
    reference: tuple[Path, Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    precision, options = COLUMNS[request.param]
    output = tmp_path_factory.mktemp("made") / "m"
    return export(
        str(reference[0]), ExportOptions(precision, output=output, verify=False, **options), QUIET
    ).folder


def of_layer(graph: ir.Graph, op_type: str, layer: int = 1) -> ir.Node:
    return next(node for node in graph if node.op_type == op_type and f"layers.{layer}/" in str(node.name))


def set_float(op_type: str, name: str, value: float) -> Callable[[ir.Graph], None]:
    def plant(graph: ir.Graph) -> None:
        of_layer(graph, op_type).attributes[name] = ir.AttrFloat32(name, value)

    return plant


def set_int(op_type: str, name: str, value: int) -> Callable[[ir.Graph], None]:
    def plant(graph: ir.Graph) -> None:
        of_layer(graph, op_type).attributes[name] = ir.AttrInt64(name, value)

    return plant


def exchange(op_type: str, first: int, second: int) -> Callable[[ir.Graph], None]:
    def plant(graph: ir.Graph) -> None:
        node = of_layer(graph, op_type)
        one, other = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, other)
        node.replace_input_with(second, one)

    return plant


def norm_of_another_layer(graph: ir.Graph) -> None:
    of_layer(graph, "SkipSimplifiedLayerNormalization", 1).replace_input_with(
        2, of_layer(graph, "SkipSimplifiedLayerNormalization", 2).inputs[2]
    )


def behind(
    op_type: str, *made: tuple[str, float | None], place: str = "layers.1/"
) -> Callable[[ir.Graph], None]:
    """Operators behind the first output of a node, each with a number as its second input, or none."""

    def plant(graph: ir.Graph) -> None:
        node = next(node for node in graph if node.op_type == op_type and place in str(node.name))
        readers = list(node.outputs[0].uses())
        value = node.outputs[0]
        for index, (kind, number) in enumerate(made):
            inputs: list[ir.Value | None] = [value]
            if number is not None:
                tensor = ir.tensor(np.asarray(number, dtype=np.float32), name=f"planted_{index}")
                constant = ir.Value(
                    name=tensor.name, shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor
                )
                graph.register_initializer(constant)
                inputs.append(constant)
            to = {"half": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16, "int": ir.DataType.INT32}
            back = {"float": ir.DataType.FLOAT}
            cast = (to | back).get(kind)
            new = ir.node(
                "Cast" if cast else kind, inputs, {"to": cast} if cast else {}, name=f"planted/{index}"
            )
            value = new.outputs[0]
            value.name = f"planted_output_{index}"
            graph.insert_after(node, new)
            node = new
        for use in readers:
            use.node.replace_input_with(use.idx, value)

    return plant


ATTENTION, NORM = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"
PLANTED: dict[str, Callable[[ir.Graph], None]] = {
    "attention scale 5% off in one layer": set_float(ATTENTION, "scale", 0.25 * 1.05),
    "soft cap of 5 in one layer": set_float(ATTENTION, "softcap", 5.0),
    "epsilon of 1e-3 in one norm": set_float(NORM, "epsilon", 1e-3),
    "SiLU 3% too steep in one layer": set_float("QuickGelu", "alpha", 1.03),
    "interleaved rotary positions": set_int(ATTENTION, "rotary_interleaved", 1),
    "window one short": set_int(ATTENTION, "local_window_size", 15),
    "window one long": set_int(ATTENTION, "local_window_size", 17),
    "no rotary positions": set_int(ATTENTION, "do_rotary", 0),
    "keys and values exchanged": exchange(ATTENTION, 3, 4),
    "cosines and sines exchanged": exchange(ATTENTION, 7, 8),
    "norm of another layer": norm_of_another_layer,
    "attention 1% too strong, by a product": behind(ATTENTION, ("Mul", 1.01)),
    "norm 0.5% too strong, by a product": behind(NORM, ("Mul", 1.005)),
    "norm shifted by 0.01": behind(NORM, ("Add", 0.01)),
    "activation 1% too strong": behind("QuickGelu", ("Mul", 1.01)),
    "activation cut off at 1": behind("QuickGelu", ("Min", 1.0)),
    "through float16": behind(NORM, ("half", None), ("float", None)),
    "through bfloat16": behind(NORM, ("bfloat16", None), ("float", None)),
    "through int": behind(NORM, ("int", None), ("float", None)),
    "another activation behind attention": behind(ATTENTION, ("Tanh", None)),
}


def first_failures(folder: Path, reference: Reference) -> Iterator[str]:
    for proof, failures in failures_one_by_one(folder, reference, QUIET):
        for failure in failures:
            yield f"{proof.name}: {failure.where}: {failure.what}"
        if failures:
            return


def test_an_export_with_nothing_planted_passes_with_room_to_spare(
    made: Path, reference: tuple[Path, Reference]
) -> None:
    for proof, failures in failures_one_by_one(made, reference[1], QUIET):
        assert not failures, (proof.name, failures)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_is_caught(
    made: Path, reference: tuple[Path, Reference], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "m"))
    edit_graph(folder, PLANTED[kind])
    assert list(first_failures(folder, reference[1])), f"{kind} was not seen"
