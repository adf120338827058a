"""If one of these fails, an adapter changes other weights than it was trained to, or is taken for another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qconvert.checkpoint.adapters.merge import Product
from qconvert.checkpoint.load import load_model, open_checkpoint, with_adapters
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.cli import main
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from tests.qconvert.adapting import make_adapter
from tests.qconvert.breaking import edit_json
from tests.qconvert.quantising import make_gptq
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)
ALL = r"(q|k|v|o|gate|up|down)_proj"
KINDS: dict[str, dict[str, Any]] = {
    "two matrices": {},
    "all linear layers": {"modules": ALL, "target_modules": "all-linear"},
    "an expression": {
        "modules": r"layers\.1\.self_attn\.(q|k)_proj",
        "target_modules": r".*\.1\.self_attn\.(q|k)_proj",
    },
    "ranks": {"ranks": {"1.self_attn.q_proj": 2, "v_proj": 8}},
    "alphas": {"alphas": {"0.self_attn.q_proj": 32, "v_proj": 3}},
    "rslora": {"use_rslora": True, "ranks": {"v_proj": 9}},
    "some layers": {
        "modules": r"layers\.[12]\.self_attn\.(q|v)_proj",
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    },
    "all but some": {"modules": r"layers\.[^1]\.self_attn\.(q|v)_proj", "exclude_modules": r".*\.1\..*"},
    "in bfloat16": {"dtype": "bfloat16"},
    "an embedding": {"modules": r"(embed_tokens|q_proj)", "target_modules": ["embed_tokens", "q_proj"]},
    "a head": {"modules": r"(lm_head|q_proj)", "target_modules": ["lm_head", "q_proj"]},
    "modules to save": {
        "saved": ("lm_head", "input_layernorm"),
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    "biases": {"biases": True, "bias": "lora_only"},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "base", tie_word_embeddings=False)


def merged(base: Path, *names: str) -> CheckpointWeights:
    return CheckpointWeights(load_model(with_adapters(open_checkpoint(base), names)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_what_the_adapter_says(base: Path, tmp_path: Path, kind: str) -> None:
    changes = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    before = (base / "model.safetensors").read_bytes()
    found, plain = merged(base, str(tmp_path / "adapter")), merged(base)
    replaced = KINDS[kind].get("saved", ()) or ("bias",) * KINDS[kind].get("biases", False)
    for name in plain._tensors:
        due = plain[name]
        if name in changes:
            due = changes[name] if any(end in name for end in replaced) else due + changes[name]
        assert torch.allclose(found[name], due, rtol=0, atol=1e-6), name
        assert (name in changes) != torch.equal(found[name], plain[name]), name
    assert (base / "model.safetensors").read_bytes() == before


def test_several_adapters_are_added_with_their_weights(base: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", base)
    other = make_adapter(tmp_path / "other", base, modules=ALL, target_modules="all-linear", rank=2, seed=1)
    found = merged(base, str(tmp_path / "one"), f"{tmp_path / 'other'}=-0.5")
    plain = merged(base)
    for name in set(one) | set(other):
        due = plain[name] + one.get(name, 0) - 0.5 * other.get(name, 0)
        assert torch.allclose(found[name], due, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_an_export_is_proven_against_the_merged_model(base: Path, tmp_path: Path, precision: str) -> None:
    make_adapter(tmp_path / "mine", base, modules=ALL, target_modules="all-linear")
    options = ExportOptions(
        precision=precision,
        recipe="rtn" if precision == "int4" else None,
        adapters=(f"{tmp_path / 'mine'}=0.5",),
        output=tmp_path / "out",
    )
    exported = export(str(base), options, QUIET)
    assert exported.report is not None
    assert exported.report.passed
    manifest = json.loads((tmp_path / "out" / "qconvert.json").read_text())
    (recorded,) = manifest["source"]["adapters"]
    assert (recorded["name"], recorded["weight"], recorded["rank"]) == ("mine", 0.5, 4)
    assert set(recorded["sha256"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest["name"] == "base-with-mine"


def test_verify_asks_for_the_adapters_that_were_merged(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "mine", base)
    make_adapter(tmp_path / "another", base, seed=2)
    options = ExportOptions(
        precision="fp32", adapters=(str(tmp_path / "mine"),), output=tmp_path / "out", verify=False
    )
    export(str(base), options, QUIET)

    def verify(*adapters: str) -> tuple[int, str]:
        given = [part for each in adapters for part in ("--adapter", each)]
        result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--reference", str(base), *given])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, " ".join(result.output.split())

    assert verify(str(tmp_path / "mine"))[0] == 0
    for wrong in ((), (str(tmp_path / "another"),), (f"{tmp_path / 'mine'}=2",)):
        code, told = verify(*wrong)
        assert code == 1
        assert "not the adapters that were merged" in told
        assert "--adapter mine=1.0" in told


@pytest.mark.parametrize(("named", "told"), [("Qwen/Base", False), ("/data/base/", False), ("a/Llama", True)])
def test_an_adapter_of_a_model_of_another_name_is_told(
    base: Path, tmp_path: Path, named: str, told: bool
) -> None:
    """Shapes of two trainings of one model are alike, and the answers are not."""
    folder = make_adapter(tmp_path / "mine", base) and tmp_path / "mine"
    edit_json(folder / "adapter_config.json", lambda raw: raw.update(base_model_name_or_path=named))
    notes = with_adapters(open_checkpoint(base), [str(folder)]).notes
    assert (f"mine says that it was trained on {named}, and this is base" in notes) == told


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_packed_again_and_that_is_told(
    tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    written = make_gptq(tmp_path / "base", bits=bits, initializer_range=0.08)
    make_adapter_of(tmp_path, written)
    options = ExportOptions(adapters=(str(tmp_path / "mine"),), output=tmp_path / "out")
    exported = export(str(tmp_path / "base"), options, Progress())
    assert exported.report is not None
    assert exported.report.passed
    assert json.loads((tmp_path / "out" / "qconvert.json").read_text())["precision"] == f"int{bits}"
    told = " ".join(capsys.readouterr().err.split())
    assert "its weights are dequantised, the adapters merged, and all packed again" in told
    assert f"rounded a second time to int{bits}" in told


def make_adapter_of(tmp_path: Path, written: dict[str, Any]) -> None:
    """An adapter of a model whose matrices are in codes."""
    from safetensors.torch import save_file

    (tmp_path / "floats").mkdir()
    save_file(
        {name: matrix.floats for name, matrix in written.items()}, tmp_path / "floats/model.safetensors"
    )
    make_adapter(tmp_path / "mine", tmp_path / "floats", lora_alpha=1)


PLANTED: dict[str, Callable[[float], float]] = {
    "its scale ignored": lambda factor: 1.0,
    "added twice": lambda factor: 2 * factor,
    "its sign": lambda factor: -factor,
    "not added": lambda factor: 0.0,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_an_error_in_the_merge_is_caught(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What an export is compared with is merged by the same code; the proof has other code for some rows."""
    make_adapter(tmp_path / "mine", base)
    right = Product.rows

    def wrong(product: Product, rows: Any) -> torch.Tensor:
        return right(replace(product, factor=PLANTED[kind](product.factor)), rows)

    monkeypatch.setattr(Product, "rows", wrong)
    options = ExportOptions(precision="fp32", adapters=(str(tmp_path / "mine"),), output=tmp_path / "out")
    with pytest.raises(QconvertError, match="adapters are merged wrongly"):
        export(str(base), options, QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "mine"}
