"""If these fail, TensorRT is given a graph that does not compute what PyTorch does, or that it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Qwen2ForCausalLM

from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.formats.columns import pack_int4_columns, unpack_int4_columns
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.lowering.trt.float32_kernels import compute_in_float32
from qconvert.progress import Progress
from qrun.backends.opening import open_session
from qrun.errors import QrunError
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import run
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)
LENGTH = 48


def export_tiny(checkpoint: Path, output: Path, precision: str, length: int = LENGTH, **options: Any) -> Path:
    chosen = ExportOptions(
        target="tensorrt", precision=precision, max_length=length, output=output, verify=False, **options
    )
    return export(str(checkpoint), chosen, QUIET).folder


def pytorch_logits(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return Qwen2ForCausalLM.from_pretrained(checkpoint)(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": False},
        {"yarn": True, "seed": 1},
        {"sliding": True, "seed": 2},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
    ],
    ids=["tied", "untied", "yarn", "sliding", "multi-head", "head_dim"],
)
def test_fp32_logits_are_pytorchs_in_one_go_in_pieces_and_to_the_last_slot(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "c", **settings)
    session = open_session(export_tiny(checkpoint, tmp_path / "m", "fp32"))
    ids = np.random.default_rng(0).integers(0, 320, (1, LENGTH))
    expected = pytorch_logits(checkpoint, ids)
    whole = session.forward(ids, session.new_cache(), "all").copy()
    assert np.abs(whole - expected).max() < 1e-3

    cache, pieces = session.new_cache(), []
    for start, stop in [(0, 7), (7, 8), (8, 30), *((step, step + 1) for step in range(30, LENGTH))]:
        pieces.append(session.forward(ids[:, start:stop], cache, "all").copy())
    assert cache.length == LENGTH == cache.limit
    assert np.abs(np.concatenate(pieces, 1) - expected).max() < 1e-3


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.2), ("bf16", 1.5)])
def test_half_types_stay_near_pytorch(tied: Path, tmp_path: Path, precision: str, limit: float) -> None:
    session = open_session(export_tiny(tied, tmp_path / "m", precision))
    ids = np.random.default_rng(0).integers(0, 320, (1, LENGTH))
    logits, expected = session.forward(ids, session.new_cache(), "all"), pytorch_logits(tied, ids)
    assert np.abs(logits - expected).max() < limit
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.85


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int4", "fp32"])
def test_every_precision_passes_the_same_verification(tied: Path, tmp_path: Path, precision: str) -> None:
    result = run(
        "export", tied, "--target", "tensorrt", "--precision", precision, "--max-length", "160",
        "--output", tmp_path / "m", *(["--block-size", "16"] if precision == "int4" else []),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "m")
    manifest.check_files(hashes=True)
    assert (manifest.verification, manifest.target) == ("passed", "tensorrt")
    assert manifest.raw["kv_cache"]["length"] == manifest.model.context_length == 160
    assert re.search(r"full +to the last slot +65 ", result.output)
    assert not (tmp_path / "m" / "genai_config.json").exists()


def graphs(folder: Path) -> tuple[ir.Model, ir.Model]:
    return ir.load(folder / "model.onnx"), ir.load(folder / "model.standard.onnx")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int4"])
def test_the_spellings_differ_in_attention_and_in_its_mask_or_lengths_alone(
    tied: Path, tmp_path: Path, precision: str
) -> None:
    trt, runnable = graphs(export_tiny(tied, tmp_path / "m", precision))
    # The runnable one has Casts around arithmetic; without them it must be the builder's, node by node.
    plain = standard_before_casts(tied, tmp_path / "plain", precision)
    ours, theirs = ({node.name: describe(node) for node in model.graph} for model in (trt, plain))
    different = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    attention = "/model/layers.{}/self_attn/attention/{}"
    expected = {
        attention.format(layer, kind) for layer in range(3) for kind in ("Attention", "TRT_Attention")
    }
    # Attention's output is named after its operator, and its reader names it.
    expected |= {f"/model/layers.{layer}/self_attn/Transpose_4" for layer in range(3)}
    expected |= {"/mask/Unsqueeze", "/mask/LessOrEqual", "/filled/Gather", "/filled/Add", "/filled/Cast"}
    assert different == expected
    for model in (runnable, plain):
        assert [value.name for value in trt.graph.inputs] == [value.name for value in model.graph.inputs]
        assert [value.name for value in trt.graph.outputs] == [value.name for value in model.graph.outputs]


def describe(node: ir.Node) -> tuple[Any, ...]:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = tuple(None if value is None else value.name for value in node.inputs)
    outputs = tuple((value.name, value.dtype, str(value.shape)) for value in node.outputs)
    return node.op_type, attributes, inputs, outputs


def standard_before_casts(checkpoint: Path, output: Path, precision: str) -> ir.Model:
    kept: list[Path] = []

    def keep(model: ir.Model) -> None:
        kept.append(output.with_suffix(".onnx"))
        ir.save(model, kept[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qconvert.lowering.trt.float32_kernels.compute_in_float32", keep)
        output.parent.mkdir(exist_ok=True)
        export_tiny(checkpoint, output, precision)
    return ir.load(kept[0])


def test_the_runnable_graph_adds_casts_and_changes_nothing_else() -> None:
    half = ir.DataType.BFLOAT16
    values = [ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(half)) for name in "ab"]
    total = ir.Value(name="total", shape=ir.Shape([2]), type=ir.TensorType(half))
    out = ir.Value(name="out", shape=ir.Shape([2, 1]), type=ir.TensorType(half))
    nodes = [
        ir.node("Add", values, outputs=[total], name="add"),
        ir.node("Transpose", [total], outputs=[out], name="turn"),
    ]
    model = ir.Model(ir.Graph(values, [out], nodes=nodes, opset_imports={"": 24}), ir_version=11)
    compute_in_float32(model)
    operators = [(node.op_type, [str(value.dtype) for value in node.outputs]) for node in model.graph]
    assert operators == [
        ("Cast", ["FLOAT"]),
        ("Cast", ["FLOAT"]),
        ("Add", ["FLOAT"]),
        ("Cast", ["BFLOAT16"]),
        ("Transpose", ["BFLOAT16"]),
    ]


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_both_graphs_read_the_same_bytes(tied: Path, tmp_path: Path, precision: str) -> None:
    folder = export_tiny(tied, tmp_path / "m", precision)

    def places(model: ir.Model) -> dict[str, tuple[Any, ...]]:
        tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
        return {
            name: (tensor.location, tensor.offset, tensor.length)
            for name, tensor in tensors.items()
            if isinstance(tensor, ir.ExternalTensor)
        }

    trt, standard = map(places, graphs(folder))
    assert trt == standard
    assert {location for location, _, _ in trt.values()} == {"model.onnx.data"}
    data = (folder / "model.onnx.data").stat().st_size
    assert data < sum(length + 4096 for _, _, length in trt.values())  # nothing is stored twice


def operators(folder: Path, name: str = "model.onnx") -> list[ir.Node]:
    return list(ir.load(folder / name).graph)


def test_traps_of_the_parser_are_not_in_our_graph(tied: Path, tmp_path: Path) -> None:
    """Each of these parses and then computes nonsense, or fails in the build (see docs/tensorrt.md)."""
    model = ir.load(export_tiny(tied, tmp_path / "m", "int4") / "model.onnx")
    for node in model.graph:
        if "Attention" in node.op_type:
            assert node.op_type == "TRT_Attention"
            assert node.attributes["causal_kind"].value == "lower_right"  # is_causal means upper left
            assert "is_causal" not in node.attributes
            assert all(value.dtype == ir.DataType.BFLOAT16 for value in node.inputs[:3])
            assert node.inputs[4] is None  # queries' lengths are cumulative, and for packed queries only
            assert node.inputs[5].dtype == ir.DataType.INT32
        if node.op_type == "DequantizeLinear":
            assert node.inputs[0].dtype == ir.DataType.INT4
            assert len(node.inputs) == 2
            assert node.attributes["axis"].value == 0
        if node.op_type == "TensorScatter":
            cache, _, _ = node.inputs
            assert cache.is_graph_input()
            assert node.outputs[0].is_graph_output()
            assert cache.shape[2] == LENGTH
            assert node.attributes["axis"].value == 2
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == 5 * 3
    assert sum(node.op_type == "TensorScatter" for node in model.graph) == 2 * 3


def test_norms_and_everything_element_by_element_are_float32(tied: Path, tmp_path: Path) -> None:
    """Qwen2's residual stream leaves float16's range: a norm or a sum in it would be Inf."""
    for node in operators(export_tiny(tied, tmp_path / "m", "fp16")):
        if node.op_type in ("RMSNormalization", "Add", "Mul", "Sigmoid", "RotaryEmbedding"):
            assert all(value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64) for value in node.outputs), node


def test_windowed_layers_keep_the_mask_and_a_window_beyond_the_cache_is_none(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "c", sliding=True)
    kinds = [
        node.op_type
        for node in operators(export_tiny(checkpoint, tmp_path / "m", "bf16"))
        if "Att" in node.op_type
    ]
    assert kinds == ["TRT_Attention", "Attention", "Attention"]
    short = export_tiny(checkpoint, tmp_path / "short", "bf16", length=16)
    assert [node.op_type for node in operators(short) if "Att" in node.op_type] == ["TRT_Attention"] * 3


def test_fp32_has_no_graph_for_the_builder(tied: Path, tmp_path: Path) -> None:
    folder = export_tiny(tied, tmp_path / "m", "fp32")
    assert not (folder / "model.onnx").exists()
    assert read_manifest(folder).graph == "model.standard.onnx"


def test_a_static_cache_is_never_written_past_its_end(tied: Path, tmp_path: Path) -> None:
    session = open_session(export_tiny(tied, tmp_path / "m", "bf16", length=8))
    cache = session.new_cache()
    session.forward(np.zeros((1, 7), dtype=np.int64), cache, "none")
    with pytest.raises(QrunError, match="9 tokens do not fit"):
        session.forward(np.zeros((1, 2), dtype=np.int64), cache)
    assert cache.length == 7
    with pytest.raises(QrunError, match="cannot grow"):
        session.new_cache(in_place=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "int8 is not for --target tensorrt"),
        (["--max-length", "257"], "--max-length 257 is not within 2 and the model's context of 256"),
        (["--max-length", "1"], "--max-length 1 is not within 2"),
        (["--precision", "int4", "--block-size", "256"], "blocks of 256 weights do not fit"),
        (["--precision", "int4", "--block-size", "128"], "hidden_size 64"),
    ],
)
def test_what_the_target_cannot_do(tied: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("export", tied, "--target", "tensorrt", "--output", tmp_path / "m", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "m").exists()


def test_max_length_is_not_for_onnx_runtime(tied: Path, tmp_path: Path) -> None:
    result = run("export", tied, "--max-length", "64", "--output", tmp_path / "m")
    assert result.exit_code == 1
    assert "--target tensorrt" in result.output


def test_without_a_standard_graph_the_folder_is_refused(tied: Path, tmp_path: Path) -> None:
    import json

    folder = export_tiny(tied, tmp_path / "m", "bf16")
    manifest = json.loads((folder / "qconvert.json").read_text())
    right = manifest["graph"]["standard_file"]
    for name, message in (
        ("../other.onnx", "a path outside the model folder"),
        ("other.onnx", "not one of the folder's files"),
        (None, "is missing"),
    ):
        manifest["graph"]["standard_file"] = name
        (folder / "qconvert.json").write_text(json.dumps(manifest))
        with pytest.raises(QrunError, match=message):
            open_session(folder)
    manifest["graph"]["standard_file"] = right
    (folder / "qconvert.json").write_text(json.dumps(manifest))
    with pytest.raises(QrunError, match="not on ONNX Runtime's CUDA kernels"):
        open_session(folder, device="cuda")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_columns_are_the_nearest_values(scale_dtype: torch.dtype) -> None:
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 16:32] = 0.0
    data, scales = pack_int4_columns(weight, 16, scale_dtype)
    assert (data.shape, scales.shape) == ((64, 5), (4, 10))
    back = unpack_int4_columns(data, scales)
    steps = weight.view(10, 4, 16).abs().amax(-1) / 7
    error = (back - weight).view(10, 4, 16).abs().amax(-1)
    assert bool((error <= 0.503 * steps).all())
    assert bool((back[3, 16:32] == 0).all())
    # The layout is ONNX's: row-major [K, N], the earlier of two values in the low half.
    low = int(data[0, 0]) & 15
    assert (low - 16 if low > 7 else low) * float(scales[0, 0]) == pytest.approx(float(back[0, 0]))


def test_int4_columns_name_nothing_but_refuse_nan() -> None:
    weight = torch.zeros(4, 32)
    weight[2, 5] = float("nan")
    with pytest.raises(NonFiniteWeightError):
        pack_int4_columns(weight, 32, torch.bfloat16)


def test_nan_in_an_int4_weight_is_named(tied: Path, tmp_path: Path) -> None:
    from tests.qconvert.breaking import edit_weights

    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(tied, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(QconvertError, match=f"{name} holds NaN or Inf"):
        export_tiny(tied, tmp_path / "m", "int4")
