"""If these fail, a GGUF file is read as another model than the one it was made of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFReader, quants

from qconvert.checkpoint.gguf.container import open_container
from qconvert.checkpoint.hub import resolve_source
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.cli import main
from qconvert.export import ExportOptions, export
from qconvert.formats.graph_file import load_graph
from qconvert.formats.layout import Arrays
from qconvert.formats.stored import find, joined_name
from qconvert.progress import Progress
from qrun.folder.manifest import read_manifest
from tests.qconvert.ggufs import gguf_name, make_gguf, split, write_gguf
from tests.tiny import LLAMA3

QUIET = Progress(quiet=True)
TOKENS = list(range(40, 120))
# What every file of Llama 3 has; transformers warns about a context that is shorter, and goes on.
AS_LLAMA3 = {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}
SETTINGS: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen3": {}, "llama": AS_LLAMA3}
TEXTS = [
    "the theme in a thé, then",
    "<|im_start|>user\nthe <|im_end|> the<|endoftext|>",
    "é ﬁ Å 你好 😀 \r\n\t  x_1 = 0x1F;",
    "",
]


def opened(path: Path):
    return open_checkpoint(resolve_source(str(path)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SETTINGS)
def test_floats_give_the_very_logits_of_the_checkpoint(tmp_path: Path, family: str, tied: bool) -> None:
    folder, path = make_gguf(tmp_path, family, tie_word_embeddings=tied, **SETTINGS[family])
    found, original = opened(path), open_checkpoint(folder)
    ours = Reference(load_model(found)).logits(TOKENS)
    assert np.array_equal(ours, Reference(load_model(original)).logits(TOKENS))
    for key in ("rope_parameters", "rms_norm_eps", "head_dim", "tie_word_embeddings", "num_key_value_heads"):
        assert getattr(found.config, key, None) == getattr(original.config, key, None), key
    assert found.name == path.stem


def test_tokenizer_template_and_end_tokens_are_the_checkpoints(tmp_path: Path) -> None:
    folder, path = make_gguf(tmp_path)
    found = opened(path)
    ours, theirs = read_tokenizer(found.folder), read_tokenizer(folder)
    assert ours is not None
    assert theirs is not None
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        ids = theirs.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours.encode("the theme").ids) < len("the theme"), "nothing was merged"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (found.folder / "chat_template.jinja").read_text() == settings["chat_template"]
    assert found.ends.ids == [258, 256]


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_an_export_holds_the_files_own_codes(tmp_path: Path, family: str, kind: str) -> None:
    """Read from both sides: from the file by gguf's own reader, from the graph by the proof's."""
    _, path = make_gguf(tmp_path, family, kind, **SETTINGS[family])
    done = export(str(path), ExportOptions(None, output=tmp_path / "model"), QUIET)
    assert done.report is not None
    assert done.report.passed
    manifest = read_manifest(tmp_path / "model")
    assert manifest.recipe.kept == 22
    arrays, checkpoint = Arrays(tmp_path / "model" / "model.onnx"), opened(path)
    raw = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        stored = find(arrays, [name], checkpoint.tensors[name].shape[1])
        values = quants.dequantize(raw[gguf_name(name)].data, GGMLQuantizationType[kind])
        assert np.array_equal(stored.rows(slice(0, stored.shape[0])).numpy(), values)
    name = joined_name([f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"])
    assert arrays.has_matrix(f"{name}.q{4 if kind.startswith('Q4') else 8}")
    assert manifest.raw["source"]["files"][0]["path"] == path.name
    assert manifest.raw["source"]["dtype"].startswith(kind)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_smallest_values_that_are_whole_multiples_are_zero_points(tmp_path: Path, kind: str) -> None:
    """llama.cpp's own are not, and have residuals; where there are none, nothing is added."""
    _, path = make_gguf(tmp_path, "qwen2", kind)
    assert all(kept.fmt.residuals for kept in opened(path).held.values())
    content = bytearray(path.read_bytes())
    file = open_container(path)
    size = {"Q4_1": 20, "Q5_1": 24}[kind]
    for stored in file.tensors.values():
        if stored.kind.name == kind:
            blocks = np.frombuffer(content, np.uint8, stored.size, stored.start).reshape(-1, size)
            scales = blocks[:, :2].copy().view(np.float16)
            times = np.resize(np.array([1, 2, 4, 8], np.float16), (len(scales), 1))
            blocks[:, 2:4] = (-scales * times).view(np.uint8)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert [kept.fmt.residuals for kept in opened(path).held.values()] == [False] * 22
    done = export(str(path), ExportOptions(None, output=tmp_path / "model"), QUIET)
    assert done.report is not None
    assert done.report.passed
    assert not any(
        "residuals" in name for name in load_graph(tmp_path / "model" / "model.onnx").graph.initializers
    )


def test_what_has_no_place_is_dequantised_and_told(tmp_path: Path) -> None:
    path = Path(__file__).parent / "data" / "gguf" / "wide-Q4_K_M.gguf"
    done = CliRunner().invoke(main, ["export", str(path), "--output", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "7 of 7 quantised matrices (Q4_K, Q6_K) cannot be stored bit for bit: none of them is" in said
    assert "rounded a second time to int8" in said
    assert "already (Q4_K (GGUF), Q6_K (GGUF))" in said
    assert read_manifest(tmp_path / "model").precision == "int8"
    assert not read_manifest(tmp_path / "model").recipe.kept


def test_another_precision_rounds_codes_again(tmp_path: Path) -> None:
    _, path = make_gguf(tmp_path, "qwen2", "Q4_1")
    again = export(str(path), ExportOptions("int4", output=tmp_path / "int4"), QUIET)
    assert again.report is not None
    assert again.report.passed
    assert not read_manifest(tmp_path / "int4").recipe.kept


@pytest.mark.parametrize("name", ["sha256-4a188102020e", "MODEL.GGUF", "model.v1"])
def test_a_file_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    """Ollama's files have no ending: they were taken for a file of a folder."""
    _, path = make_gguf(tmp_path, kind="Q8_0")
    path.rename(tmp_path / name)
    exported = export(str(tmp_path / name), ExportOptions(output=tmp_path / "out"), QUIET)
    assert exported.report is not None
    assert exported.report.passed


def test_half_floats_are_read_as_they_are(tmp_path: Path) -> None:
    for kind in ("F16", "BF16"):
        _, path = make_gguf(tmp_path / kind, "qwen2", kind)
        found = opened(path)
        name = "model.layers.0.mlp.up_proj.weight"
        raw = next(tensor for tensor in GGUFReader(str(path)).tensors if tensor.name == gguf_name(name))
        values = quants.dequantize(raw.data, GGMLQuantizationType[kind])
        assert torch.equal(found.computed[name].rows(slice(None)), torch.from_numpy(values))
        assert found.held == {}


def test_inspect_and_verify_read_the_file_too(tmp_path: Path) -> None:
    _, path = make_gguf(tmp_path, "llama", "Q8_0", **AS_LLAMA3)
    shown = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert facts["whole"]
    assert facts["name"] == path.stem
    assert facts["facts"]["model"]["architectures"]["value"] == "LlamaForCausalLM"
    exported = CliRunner().invoke(main, ["export", str(path), "--output", str(tmp_path / "m"), "-q"])
    assert exported.exit_code == 0, exported.output
    verified = CliRunner().invoke(main, ["verify", str(tmp_path / "m"), "--reference", str(path), "-q"])
    assert verified.exit_code == 0, verified.output


def test_parts_are_read_together(tmp_path: Path) -> None:
    _, whole = make_gguf(tmp_path, "qwen2", "Q8_0")
    split(whole, tmp_path / "parts" / "tiny", 3)
    paths = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in paths] == [f"tiny-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for path in (paths[0], paths[2]):  # any of them names them all
        found = opened(path)
        assert found.name == "tiny"
        ours = Reference(load_model(found)).logits(TOKENS)
        assert np.array_equal(ours, Reference(load_model(opened(whole))).logits(TOKENS))
    assert len(found.weight_files) == 3
    paths[1].rename(tmp_path / "elsewhere.gguf")
    done = CliRunner().invoke(main, ["inspect", str(paths[0])])
    assert done.exit_code == 1
    assert "The part tiny-00002-of-00003.gguf is missing" in " ".join(done.output.split())
    paths[1].write_bytes(paths[0].read_bytes())
    done = CliRunner().invoke(main, ["inspect", str(paths[0])])
    assert done.exit_code == 1
    assert "says that it is part 0 of 3" in " ".join(done.output.split())


def test_a_file_without_a_tokenizer_is_exported_without_one(tmp_path: Path) -> None:
    folder, _ = make_gguf(tmp_path)
    path = tmp_path / "bare.gguf"
    write_gguf(folder, path, "Q8_0", more={"tokenizer.ggml.model": ("add_string", "none")})
    assert not (opened(path).folder / "tokenizer.json").exists()
