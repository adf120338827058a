"""If these fail, GGUF's Q4_1 and Q5_1 are exported as other weights than the file's.

They add a smallest value m to each block, which whole zero points of a scale d cannot give: the nearest zero
point z is stored, and the residual m + d z beside it.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType, quants

from qconvert.checkpoint.gguf.blocks import codes_of, keep
from qconvert.checkpoint.gguf.container import open_container
from qconvert.checkpoint.hub import resolve_source
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.cli import main
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.formats.blocks import assemble, unpack
from qconvert.formats.layout import Arrays
from qconvert.lowering.ort import decoder
from qconvert.progress import Progress
from qconvert.proof.twin import sharp_twin
from qconvert.proof.twin_session import TwinSession
from qrun.backends.opening import open_session
from qrun.folder.manifest import read_manifest
from tests.qconvert.ggufs import gguf_name, make_gguf

QUIET = Progress(quiet=True)
KINDS = {"Q4_1": 20, "Q5_1": 24}  # bytes of a block
BITS = {"Q4_1": 4, "Q5_1": 8}
TOKENS = list(range(40, 120))
LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The type, a tiny file of it, and its export, which has passed its proof."""
    root = tmp_path_factory.mktemp(request.param)
    _, path = make_gguf(root, "qwen2", request.param)
    done = export(str(path), ExportOptions(None, output=root / "model"), QUIET)
    assert done.report is not None
    assert done.report.passed
    return request.param, path, root / "model"


def blocks_of(path: Path, name: str, kind: str) -> np.ndarray:
    """A matrix's bytes ``[N, blocks, bytes of a block]``, where they lie in the file."""
    stored = open_container(path).tensors[gguf_name(name)]
    content = np.frombuffer(path.read_bytes(), np.uint8, stored.size, stored.start)
    return content.reshape(stored.shape[0], -1, KINDS[kind])


def by_hand(block: bytes, kind: str) -> tuple[Fraction, Fraction, list[int]]:
    """d, m and the 32 codes of one block, as ggml-common.h has them."""
    scale, smallest = (Fraction(float(each)) for each in np.frombuffer(block[:4], np.float16))
    low = [byte & 15 for byte in block[-16:]] + [byte >> 4 for byte in block[-16:]]
    high = int.from_bytes(block[4:8], "little") if kind == "Q5_1" else 0
    return scale, smallest, [code | ((high >> place & 1) << 4) for place, code in enumerate(low)]


def test_codes_zero_points_and_residuals_are_the_files(exported: tuple[str, Path, Path]) -> None:
    """Read from both sides: from the file byte by byte, from the graph's initializers."""
    kind, path, folder = exported
    arrays, bits, raw = Arrays(folder / "model.onnx"), BITS[kind], blocks_of(exported[1], LAYER, kind)
    data, scales, zeros, residuals = (
        arrays[f"{LAYER}.{end}"] for end in (f"q{bits}", "scales", "zero_points", "residuals")
    )
    assert residuals.any()
    for row, block in ((row, block) for row in range(0, len(raw), 7) for block in range(raw.shape[1])):
        scale, smallest, codes = by_hand(raw[row, block].tobytes(), kind)
        stored = data[row, block].tolist()
        found = stored if bits == 8 else [half for byte in stored for half in (byte & 15, byte >> 4)]
        zero = int(zeros[row, block] if bits == 8 else zeros[row, block // 2] >> (block % 2 * 4) & 15)
        assert found == codes
        assert Fraction(float(scales[row, block])) == scale
        assert abs(zero + smallest / scale) <= Fraction(1, 2) or zero in (0, 15)
        assert Fraction(float(residuals[row, block])) == smallest + scale * zero
    assert open_checkpoint(resolve_source(str(path))).held[LAYER].fmt.residuals


def test_the_graph_gives_the_dequantised_models_logits(exported: tuple[str, Path, Path]) -> None:
    """But for activations, which its products round to 8 bits: without that rounding they are equal."""
    _, path, folder = exported
    theirs = Reference(load_model(open_checkpoint(resolve_source(str(path))))).logits(TOKENS)
    twin = TwinSession(sharp_twin(folder / "model.onnx", half=False), folder, read_manifest(folder))
    (sharp,) = twin.advance([np.array(TOKENS)], twin.empty_cache(), [0])
    assert np.abs(sharp - theirs).max() < 2e-4 * theirs.std()
    tokens = np.array([TOKENS])
    session = open_session(folder)
    rounded = session.forward(tokens, session.new_cache(), "all")[0]
    assert np.abs(rounded - theirs).mean() < 0.05 * theirs.std()


def test_no_position_s_logits_may_be_wanted(exported: tuple[str, Path, Path]) -> None:
    """Blocks of no rows at all are added up then, in the last layer."""
    _, _, folder = exported
    session = open_session(folder)
    tokens, one = np.array([TOKENS]), np.array([TOKENS[-1:]])
    cache, whole = session.new_cache(), session.new_cache()
    assert session.forward(tokens[:, :-1], cache, "none").shape == (1, 0, 320)
    after = session.forward(one, cache, "last")
    assert np.allclose(after, session.forward(tokens, whole, "last"), atol=1e-4)


def test_products_of_the_same_features_share_their_sums(exported: tuple[str, Path, Path]) -> None:
    kind, _, folder = exported
    graph = ir.load(folder / "model.onnx").graph
    sums = [node for node in graph if node.op_type == "ReduceSum" and "layers.1" in (node.name or "")]
    assert len(sums) == 4, "q, k and v have one, as have gate and up; o and down have their own"
    products = [node for node in graph if node.op_type == "MatMulNBits" and "layers.1" in (node.name or "")]
    assert len(products) == 5
    assert {node.attributes["bits"].as_int() for node in products} == {BITS[kind]}


def test_the_recipe_and_inspect_say_it(exported: tuple[str, Path, Path]) -> None:
    kind, path, folder = exported
    groups = json.loads((folder / "qconvert.json").read_text())["recipe"]["kept"]
    assert [
        (group["bits"], group["symmetric"], group["residuals"], group["tensors"]) for group in groups
    ] == [(BITS[kind], False, True, 22)]
    shown = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)["facts"]["quantisation"]
    assert facts["codes that can be kept"]["value"] == facts["with residuals"]["value"] == 22
    assert facts[f"{kind} (GGUF)"]["value"] == KINDS[kind] / 4
    forecast = json.loads(shown.stdout)["weight_bytes"]["kept"]
    assert forecast == (folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_any_block_is_exact(kind: str) -> None:
    """Whatever d and m are: negative, subnormal, 0, far outside of the codes' range."""
    random = np.random.default_rng(7)
    blocks = random.integers(0, 256, (4_000, 2, KINDS[kind]), dtype=np.uint8)
    ends = np.array([0.0, -0.0, 6e-8, -6e-8, 1.0, 65504, -65504, 3e-5], np.float16)
    pairs = np.array([(scale, smallest) for scale in ends for smallest in ends])
    blocks[: len(pairs), 0, :4] = pairs.view(np.uint8).reshape(-1, 4)
    halves = np.ascontiguousarray(blocks[..., :4]).view(np.float16)
    content = blocks[np.isfinite(halves).all((1, 2))].reshape(-1, 2 * KINDS[kind])
    named = GGMLQuantizationType[kind]
    fmt, found = keep(named, content).fmt, codes_of(named, content)
    packed = assemble(found.codes, found.scales, found.zeros, fmt)
    stored = unpack(type(packed)(packed.data, packed.scales, packed.zero_points, found.residuals), fmt, 64)
    assert len(content) > 3_000
    assert np.array_equal(stored.numpy(), quants.dequantize(content, named))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_scale_or_a_smallest_value_that_is_none_is_refused(tmp_path: Path, kind: str, place: int) -> None:
    if place == 2 and kind not in KINDS:
        place = 0
    _, path = make_gguf(tmp_path, "qwen2", kind)
    stored, content = open_container(path).tensors[gguf_name(LAYER)], bytearray(path.read_bytes())
    content[stored.start + place : stored.start + place + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(QconvertError, match=r"down_proj.weight holds NaN or Inf"):
        export(str(path), ExportOptions(None, output=tmp_path / "model"), QUIET)
    assert not (tmp_path / "model").exists()


def test_neighbours_of_which_one_has_none_stand_apart(tmp_path: Path) -> None:
    """k_proj with whole zero points cannot stand beside q_proj and v_proj, which have residuals."""
    _, path = make_gguf(tmp_path, "qwen2", "Q4_1")
    name = "model.layers.0.self_attn.k_proj.weight"
    stored, content = open_container(path).tensors[gguf_name(name)], bytearray(path.read_bytes())
    blocks = np.frombuffer(content, np.uint8, stored.size, stored.start).reshape(-1, 20)
    blocks[:, 2:4] = (blocks[:, :2].copy().view(np.float16) * np.float16(-8)).view(np.uint8)
    path.write_bytes(content)
    done = export(str(path), ExportOptions(None, output=tmp_path / "model"), QUIET)
    assert done.report is not None
    assert done.report.passed
    arrays = Arrays(tmp_path / "model" / "model.onnx")
    assert f"{name}.q4" in arrays
    assert f"{name}.residuals" not in arrays
    assert f"{name.replace('k_proj', 'q_proj')}.residuals" in arrays


def test_other_options_go_on_from_dequantised_weights(tmp_path: Path) -> None:
    """The graph for prompts rounds them to 8 bits, TensorRT's to bfloat16, which is told."""
    _, path = make_gguf(tmp_path, "qwen2", "Q4_1")
    prompts = ExportOptions(None, output=tmp_path / "prompts", prefill=True, int8_kv_cache=True)
    done = export(str(path), prompts, QUIET)
    assert done.report is not None
    assert done.report.passed
    assert read_manifest(tmp_path / "prompts").recipe.kept == 22
    told = CliRunner().invoke(
        main, ["export", str(path), "--target", "tensorrt", "--output", str(tmp_path / "trt")]
    )
    assert told.exit_code == 0, told.output
    assert "they are dequantised, and rounded to bfloat16" in " ".join(told.output.split())
    assert read_manifest(tmp_path / "trt").recipe.kept == 0


def test_sums_are_exact_as_real_numbers() -> None:
    """d (q - z) + r is d q + m before any rounding, so that both round to the same float32."""
    block = np.zeros((1, 1, 20), np.uint8)
    block[0, 0, :4] = np.array([0.0123, -0.0789], np.float16).view(np.uint8)
    found = codes_of(GGMLQuantizationType.Q4_1, block.reshape(1, -1))
    assert found.zeros is not None
    assert found.residuals is not None
    assert int(found.zeros[0, 0]) == 6
    scale, smallest = (Fraction(float(each)) for each in np.array([0.0123, -0.0789], np.float16))
    assert Fraction(float(found.residuals[0, 0])) == smallest + 6 * scale
    assert found.residuals.dtype == torch.float32


def test_a_head_in_parts_has_its_residuals_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_HEAD_PART", 320 * 64 // 3)
    _, path = make_gguf(tmp_path, "qwen2", "Q4_1", tie_word_embeddings=False)
    done = export(str(path), ExportOptions(None, output=tmp_path / "model"), QUIET)
    assert done.report is not None
    assert done.report.passed
    graph = ir.load(tmp_path / "model" / "model.onnx").graph
    parts = [name for name in graph.initializers if name.startswith("lm_head.weight.residuals.from_")]
    assert len(parts) == 4
