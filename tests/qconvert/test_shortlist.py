"""If these fail, int4's logits in two steps are not those of the stored weights, or take more bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qconvert.export import ExportOptions, export
from qconvert.formats import shortlist
from qconvert.formats.blocks import pack, unpack
from qconvert.formats.halves import join_codes, split_codes
from qconvert.formats.recipe import HIGHEST_HALVES, LOWEST_HALVES, BlockFormat
from qconvert.formats.shortlist import Shortlist
from qconvert.lowering.forecast import data_bytes
from qconvert.models.spec import DecoderSpec
from qconvert.progress import Progress
from qconvert.proof.weight_check import error_in_steps
from qconvert.recipes.choose import Wishes, choose
from qconvert.targets import target_named
from qrun.backends.opening import open_session
from qrun.folder.manifest import read_manifest
from tests.qconvert.mutants import Exporter, edit_graph, overwrite
from tests.tiny import make_tiny_checkpoint

SIZE = 16
TOKENS = np.arange(3, 43, dtype=np.int64)[None]
QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def short_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' vocabulary of 320 is enough."""
    monkeypatch.setattr(shortlist, "SIZE", SIZE)


def test_halves_are_the_codes_again() -> None:
    codes = torch.arange(LOWEST_HALVES + 128, HIGHEST_HALVES + 129, dtype=torch.uint8).view(2, -1)
    upper, lower = split_codes(codes)
    assert torch.equal(join_codes(upper, lower), codes)
    # The upper halves alone are the nearest multiple of 16: at most 8 away.
    coarse = join_codes(upper, None).int() - 128
    assert torch.all(coarse % 16 == 0)
    assert (coarse - (codes.int() - 128)).abs().max() == 8


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_packing_in_halves_is_rounding_to_nearest(scale_dtype: str) -> None:
    fmt = BlockFormat(8, 32, symmetric=True, scale_dtype=scale_dtype, halves=True)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    weight[1, :32], weight[2, :32] = weight[1, :32].abs(), -weight[2, :32].abs()  # one-sided blocks
    packed = pack(weight, fmt)
    assert packed.data.max() <= 128 + HIGHEST_HALVES
    stored = unpack(packed, fmt, 64)
    room = 1 + (2**-8 if scale_dtype == "bfloat16" else 0)
    assert error_in_steps(weight, stored, fmt).max() <= 0.501 * room
    # The end of larger magnitude gets the 128 codes below zero: finer steps than 127 a side.
    assert (packed.scales.float().abs()[1:3, 0] <= weight[1:3, :32].abs().amax(-1) / 128 * room).all()


def test_the_shortlist_takes_the_likeliest_of_each_range() -> None:
    coarse = torch.tensor([[0.0, 3, 2, 1, 9, 8, 7, 6]])
    exact = coarse + 100
    found = Shortlist(2, 1).apply(coarse, exact)
    assert found.tolist() == [[0, 103, 2, 1, 109, 8, 7, 6]]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_the_shortlist_are_those_of_all_bits(tmp_path: Path, tied: bool) -> None:
    source = str(make_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied))
    two_steps, whole, coarse = (_logits(source, tmp_path / str(size), size) for size in (SIZE, 320, 2))
    assert _has_loop(tmp_path / str(SIZE))
    for position in range(TOKENS.shape[1]):
        likeliest = np.argsort(-whole[position])[: SIZE // 4]
        np.testing.assert_allclose(two_steps[position][likeliest], whole[position][likeliest], atol=0.02)
        far = np.argsort(-whole[position])[-100:]
        np.testing.assert_allclose(two_steps[position][far], coarse[position][far], atol=1e-5)
    assert np.abs(coarse - whole).max() > 0.1  # else nothing was shown


def _logits(source: str, output: Path, size: int) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortlist, "SIZE", size)
        patch.setattr(shortlist, "worth_it", lambda vocab_size: True)
        folder = export(source, ExportOptions("int4", output=output, verify=False), QUIET).folder
    session = open_session(folder, threads=1)
    return session.forward(TOKENS, session.new_cache(), "all")[0].copy()


def test_every_way_of_asking_gives_the_same_logits(tmp_path: Path) -> None:
    folder = _export(tmp_path)
    session = open_session(folder, threads=1)
    whole = session.forward(TOKENS, session.new_cache(), "all")[0].copy()
    cache = session.new_cache()
    none = session.forward(TOKENS[:, :-1], cache, "none")
    assert none.shape == (1, 0, 320)
    last = session.forward(TOKENS[:, -1:], cache)[0, 0]
    np.testing.assert_allclose(last, whole[-1], atol=1e-4)
    several = session.new_cache(batch=3)
    rows = session.forward(np.repeat(TOKENS, 3, 0), several)
    np.testing.assert_allclose(rows[:, 0], np.stack([whole[-1]] * 3), atol=1e-4)


def test_the_export_is_proven_and_no_larger(tmp_path: Path) -> None:
    folder = _export(tmp_path, verify=True)
    manifest = read_manifest(folder)
    assert manifest.raw["recipe"]["shortlist"] == SIZE
    assert manifest.raw["recipe"]["head"]["halves"] is True
    assert manifest.raw["verification"]["status"] == "passed"
    spec = _spec(320)
    recipe = choose(Wishes("int4"), target_named("onnxruntime").capabilities, spec).recipe
    whole = replace(recipe, shortlist=None, head=replace(recipe.head, halves=False))
    lower = target_named("onnxruntime").lower
    assert data_bytes(lower, spec, recipe) == data_bytes(lower, spec, whole)


@pytest.mark.parametrize("half", ["upper", "lower"])
def test_a_wrong_half_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    exporter = Exporter(make_tiny_checkpoint(tmp_path / "c"), tmp_path, monkeypatch)
    folder = exporter.export("int4")
    overwrite(folder, f"model.embed_tokens.weight.{half}", 999, b"\x0f\xf0\x0f\xf0")
    report = exporter.verify(folder)
    assert report.weights.faults[0].tensor == "model.embed_tokens.weight"


def test_a_wrong_second_step_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are right, the graph adds half of the corrections to the wrong tokens, and KL stays low."""

    def shift(graph: ir.Graph) -> None:
        starts = graph.initializers["shortlist_starts"]
        starts.const_value = ir.tensor(np.array([[1], [160]], dtype=np.int64), name="shortlist_starts")

    exporter = Exporter(make_tiny_checkpoint(tmp_path / "c"), tmp_path, monkeypatch)
    folder = exporter.export("int4")
    assert exporter.verify(folder).passed
    edit_graph(folder, shift)
    report = exporter.verify(folder)
    assert not report.passed
    assert {fault.tensor for fault in report.weights.faults} == {"lm_head.weight"}
    assert "of the second step" in report.weights.faults[0].what


def test_a_graph_for_prompts_reads_the_embedding_in_halves(tmp_path: Path) -> None:
    folder = _export(tmp_path, verify=True, prefill=True)
    session = open_session(folder, threads=1)
    cache = session.new_cache()
    assert session.forward(TOKENS, cache).shape == (1, 1, 320)
    assert read_manifest(folder).raw["verification"]["status"] == "passed"


@pytest.mark.parametrize(("precision", "vocab"), [("int4", 16 * SIZE - 1), ("int8", 320), ("fp32", 320)])
def test_where_it_is_not_used(precision: str, vocab: int) -> None:
    recipe = choose(Wishes(precision), target_named("onnxruntime").capabilities, _spec(vocab)).recipe
    assert recipe.shortlist is None
    assert recipe.head is None or not recipe.head.halves


def _spec(vocab: int) -> DecoderSpec:
    return DecoderSpec(3, 4, 2, 16, 64, 128, vocab, 1e-6, True, 256, (None, None, None))


def _export(tmp_path: Path, **options: bool) -> Path:
    source = str(make_tiny_checkpoint(tmp_path / "checkpoint"))
    chosen = ExportOptions("int4", output=tmp_path / "m", **{"verify": False, **options})
    return export(source, chosen, QUIET).folder


def _has_loop(folder: Path) -> bool:
    return any(node.op_type == "Loop" for node in ir.load(folder / "model.onnx").graph)
