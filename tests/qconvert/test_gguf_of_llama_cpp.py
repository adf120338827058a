"""If these fail, files that llama.cpp wrote are read as other numbers than llama.cpp reads in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qconvert.checkpoint.hub import resolve_source
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.export import ExportOptions, export
from qconvert.formats.layout import Arrays
from qconvert.formats.stored import find
from qconvert.progress import Progress
from qrun.folder.manifest import read_manifest
from tests.qconvert.adapting import make_adapter
from tests.qconvert.llama_cpp_sources import SOURCES, make_source

FOLDER = Path(__file__).parent / "data" / "gguf"
FILES = sorted(FOLDER.glob("*.gguf"))
LOGITS = np.load(FOLDER / "logits.npz")
TOKENS = (84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116, 259, 261, 120, 200, 17)
KEPT = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


def reference(path: Path) -> Reference:
    return Reference(load_model(open_checkpoint(resolve_source(str(path)))))


@pytest.mark.parametrize("name", SOURCES)
def test_floats_give_llama_cpp_s_logits(tmp_path: Path, name: str) -> None:
    """Rows of q and k, factors of the rotary embedding, norms of heads: all as llama.cpp takes them."""
    ours = reference(make_source(name, tmp_path)).logits(TOKENS)
    assert np.abs(ours - LOGITS[name]).max() < 1e-4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_own_files_give_its_logits_but_for_rounded_activations(path: Path) -> None:
    """llama.cpp rounds activations to 8 bits in products; weights that were read wrongly would be far off."""
    theirs, floats = LOGITS[path.stem], LOGITS[path.stem.split("-")[0]]
    ours = reference(path).logits(TOKENS)
    off = np.abs(ours - theirs).mean()
    assert off < 0.04 * theirs.std()
    if "Q4" in path.stem:
        assert off < np.abs(floats - theirs).mean() / 4, "nearer to the floats than to the file"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_own_files_are_exported_and_proven(tmp_path: Path, path: Path) -> None:
    done = export(str(path), ExportOptions(None, output=tmp_path / "model"), Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed
    manifest = read_manifest(tmp_path / "model")
    kept = path.stem.split("-")[1] in KEPT
    assert (manifest.recipe.kept > 0) is kept
    if not kept:
        return
    checkpoint, arrays = open_checkpoint(resolve_source(str(path))), Arrays(tmp_path / "model" / "model.onnx")
    for name, tensor in checkpoint.computed.items():
        if name.endswith(("o_proj.weight", "up_proj.weight")):
            stored = find(arrays, [name], tensor.shape[1])
            rows = slice(0, tensor.shape[0])
            assert np.array_equal(stored.rows(rows).numpy(), tensor.rows(slice(None)).numpy()), name


@pytest.mark.parametrize(("stem", "scales"), [("qwen2-Q8_0", "float16"), ("wide-Q4_0", "float32")])
def test_an_embedding_is_stored_once_and_in_8_bits(tmp_path: Path, stem: str, scales: str) -> None:
    """A tied one of Q8_0 was stored in floats as well; and Q6_K, llama.cpp's beside Q4_0, in floats alone."""
    export(str(FOLDER / f"{stem}.gguf"), ExportOptions(None, output=tmp_path / "m"), Progress(quiet=True))
    graph = ir.load(tmp_path / "m" / "model.onnx").graph
    names = {name for name in graph.initializers if "embed_tokens" in name}
    weight = "model.embed_tokens.weight"
    assert names == {f"{weight}.q8", f"{weight}.q8.rows", f"{weight}.scales"}
    assert graph.initializers[f"{weight}.scales"].const_value.dtype.numpy() == scales


@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("qwen3-Q4_0", {"target": "tensorrt"}),
        ("llama-Q4_0", {"target": "tensorrt"}),
        ("wide-Q4_0", {"prefill": True, "int8_kv_cache": True}),
        ("qwen2-Q8_0", {"prefill": True, "int8_kv_cache": True}),
        ("qwen2-Q4_1", {"prefill": True, "int8_kv_cache": True}),
    ],
    ids=str,
)
def test_its_own_files_with_other_options(tmp_path: Path, stem: str, options: dict[str, Any]) -> None:
    chosen = ExportOptions(None, output=tmp_path / "m", **options)
    done = export(str(FOLDER / f"{stem}.gguf"), chosen, Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed
    assert read_manifest(tmp_path / "m").recipe.kept > 0


def test_an_adapter_is_merged_into_its_own_file(tmp_path: Path) -> None:
    """Rows of Llama's q and k stand in another order there than in the adapter."""
    make_source("llama", tmp_path)
    make_adapter(tmp_path / "adapter", tmp_path / "llama" / "llama-original")
    path, chosen = FOLDER / "llama-Q4_0.gguf", {"adapters": (str(tmp_path / "adapter"),)}
    done = export(str(path), ExportOptions(None, output=tmp_path / "m", **chosen), Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed
    assert read_manifest(tmp_path / "m").recipe.kept == 0
