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
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from tests.qconvert.quantising import SIZES, Rounded, Written, make_awq, make_compressed, make_gptq

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
    "gptq: 8 bits for some": (make_gptq, {"others": (".*down_proj", 8, 64)}),
    "awq": (make_awq, {}),
    "awq: symmetric": (make_awq, {"symmetric": True}),
    "awq: groups of 64": (make_awq, {"group": 64}),
    "awq: one group a row": (make_awq, {"group": -1}),
    "compressed-tensors: 4 bits, symmetric": (make_compressed, {}),
    "compressed-tensors: 4 bits": (make_compressed, {"symmetric": False}),
    "compressed-tensors: 8 bits, symmetric": (make_compressed, {"bits": 8}),
    "compressed-tensors: 8 bits": (make_compressed, {"bits": 8, "symmetric": False}),
    "compressed-tensors: channels": (make_compressed, {"group": -1}),
    "compressed-tensors: an order of inputs": (make_compressed, {"order": True, "symmetric": False}),
    "compressed-tensors: integers of 8 bits": (make_compressed, {"bits": 8, "group": -1, "integers": True}),
    # Their codes were packed with what lies above the 4 bits.
    "compressed-tensors: integers of 4 bits": (make_compressed, {"group": 64, "integers": True}),
    "compressed-tensors: integers of 4 bits with zero points": (
        make_compressed,
        {"group": 64, "integers": True, "symmetric": False},
    ),
    "compressed-tensors: integers with zero points": (
        make_compressed,
        {"bits": 8, "group": 64, "integers": True, "symmetric": False},
    ),
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


# One of each maker's and one with an order of inputs; `make test-slow` exports the others.
AT_ONCE = (
    "gptq: 4 bits",
    "gptq: an order of inputs, 8 bits",
    "awq",
    "compressed-tensors: integers of 8 bits",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in AT_ONCE else pytest.mark.slow) for kind in KINDS]
)
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
    assert np.array_equal(found.scales[:, found.groups], matrix.scales.astype(np.float32)[:, matrix.groups])
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
        scales = scales.const_value.numpy().astype(np.float32)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq: an order of inputs", "gptq: 8 bits, symmetric", "awq"])
@pytest.mark.parametrize(
    "options",
    [
        {"prefill": True},
        {"int8_kv_cache": True},
        {"prefill": True, "int8_kv_cache": True},
        {"precision": "fp32"},
        {"precision": "int8"},
        {"precision": "int4"},
        {"precision": "int4", "recipe": "gptq"},
        {"precision": "int4", "recipe": "rtn", "prefill": True, "int8_kv_cache": True},
        {"precision": "fp16"},
    ],
    ids=lambda options: ", ".join(f"{key} {value}" for key, value in options.items()),
)
def test_every_option_of_an_export_works_with_it(
    tmp_path: Path, kind: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make, settings = KINDS[kind]
    # Smaller weights: a random model that is rounded to 4 bits loses more than a trained one, and the limits.
    make(tmp_path / "model", **settings, initializer_range=0.08)
    chosen = ExportOptions(output=tmp_path / "out", **options)
    report = export(str(tmp_path / "model"), chosen, Progress()).report
    assert report is not None
    assert report.passed
    told = " ".join(capsys.readouterr().err.split())
    if "precision" not in options:
        assert "matrices keep the checkpoint's own codes" in told
    else:
        assert {
            "fp32": "nothing is rounded",
            "fp16": "rounded to float16",
            "int8": "rounded a second time to int8",
            "int4": "rounded a second time to int4",
        }[options["precision"]] in told


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"prefill": True, "int8_kv_cache": True}], ids=["alone", "with all"])
def test_embedding_and_head_may_be_rounded_to_8_bits(
    tmp_path: Path, tied: bool, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """In floats they outweigh the rest: 113 of the sample's 173 MB."""
    make_gptq(tmp_path / "model", tie_word_embeddings=tied, initializer_range=0.08)
    sizes = []
    for name, chosen in (("float", {}), ("int8", {"int8_head": True})):
        report = export(
            str(tmp_path / "model"), ExportOptions(output=tmp_path / name, **options, **chosen), Progress()
        ).report
        assert report is not None
        assert report.passed
        sizes.append((tmp_path / name / "model.onnx.data").stat().st_size)
    saved = sizes[0] - sizes[1]
    embedding = 320 * SIZES["hidden_size"]
    assert saved > (1 if tied else 2) * 2.8 * embedding
    assert "embedding and head are rounded to 8 bits" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "options",
    [{"block_size": 32}, {"recipe": "gptq"}, {"calibrate": "default"}],
    ids=lambda each: next(iter(each)),
)
def test_what_is_for_rounding_is_refused_where_nothing_is_rounded(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    make_gptq(tmp_path / "model")
    with pytest.raises(QconvertError, match="this checkpoint's are kept") as caught:
        export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out", **options), QUIET)
    assert "with --precision int4" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_tensorrt_keeps_symmetric_4_bits(tmp_path: Path) -> None:
    written = make_gptq(tmp_path / "model")
    options = ExportOptions(target="tensorrt", output=tmp_path / "out", max_length=128)
    exported = export(str(tmp_path / "model"), options, QUIET)
    assert exported.report is not None
    assert exported.report.passed
    graph = ir.load(exported.folder / "model.onnx").graph
    found = 0
    for node in graph:
        if node.op_type != "DequantizeLinear":
            continue
        data, scales = (each.const_value for each in node.inputs)
        codes, first = data.numpy().astype(np.int64).T, 0
        for name, rows in parts(data.name, len(codes)):
            part = slice(first, first + rows)
            assert np.array_equal(codes[part] + 8, written[name].codes)
            due = torch.from_numpy(written[name].scales).bfloat16().float().numpy()
            assert np.array_equal(scales.numpy().astype(np.float32).T[part], due)
            first, found = first + rows, found + 1
    assert found == len(written)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"symmetric": False}, "dequantised, and rounded to bfloat16"),
        ({"desc_act": True}, "dequantised, and rounded to bfloat16"),
        ({"bits": 8}, "dequantised, and rounded to bfloat16"),
        ({}, "14 matrices keep the checkpoint's own codes (4 bits in groups of 32 (gptq))"),
    ],
)
def test_what_tensorrt_has_no_place_for_is_told(
    tmp_path: Path, settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_gptq(tmp_path / "model", **settings)
    options = ExportOptions(target="tensorrt", output=tmp_path / "out", max_length=128)
    report = export(str(tmp_path / "model"), options, Progress()).report
    assert report is not None
    assert report.passed
    assert told in " ".join(capsys.readouterr().err.split())
