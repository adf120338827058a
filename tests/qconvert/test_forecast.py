"""The bytes that ``inspect`` forecasts are those that an export writes, to the last one.

If these fail, people are told a wrong size, and an export starts that the disk has no room for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export, write_graph
from qconvert.formats.folding import NO_FOLDING, Folding, folded_inputs
from qconvert.formats.recipe import Recipe
from qconvert.formats.stored import kv_scale_name
from qconvert.inspection.inspection import describe
from qconvert.lowering.forecast import data_bytes
from qconvert.models.families import spec_of
from qconvert.models.spec import DecoderSpec
from qconvert.progress import Progress
from qconvert.targets import TARGETS
from tests.qconvert.combinations import accepted, distinct
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)
# Sizes with blocks to fill up, an odd number of blocks in a row, and parts of the MLP of two lengths.
ODD: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 112, "num_attention_heads": 5, "head_dim": 16}
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}  # the last is not whole in a graph for prompts
MODELS: dict[str, dict[str, Any]] = {
    "untied": TWO_LAYERS | {"tie_word_embeddings": False},
    "odd sizes": TWO_LAYERS | ODD | {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "large head sizes, windows": TWO_LAYERS | {"head_dim": 32, "yarn": True, "sliding": True},
    # The head's second step, and tensors that begin with a page.
    "large vocabulary": {"vocab_size": 20_000, "num_hidden_layers": 1},
    "large vocabulary, untied": {"vocab_size": 4096, "num_hidden_layers": 1, "tie_word_embeddings": False},
}


def written(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.glob("*.data")}


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_every_combination_of_options_is_forecast_to_the_byte(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = load_model(open_checkpoint(make_tiny_checkpoint(tmp_path / "c", **sizes)))
    spec = spec_of(model.config)
    combinations = distinct(accepted(spec), spec)
    assert len(combinations) > 90
    for number, combination in enumerate(combinations):
        target, recipe = TARGETS[combination.target], combination.recipe(spec)
        fitted, folder = target.fit(spec, None), tmp_path / str(number)
        folder.mkdir()
        scales = kv_scales(spec) if recipe.kv_cache else {}
        folding = even_folding(spec, recipe)
        write_graph(model, fitted, recipe, target, folder, folding=folding, kv_scales=scales)
        assert data_bytes(target.lower, fitted, recipe) == written(folder), combination
        for file in folder.iterdir():
            file.unlink()


def kv_scales(spec: DecoderSpec) -> dict[str, torch.Tensor]:
    shape = (1, spec.num_key_value_heads, 1, spec.head_size)
    places = ((layer, part) for layer in range(spec.num_hidden_layers) for part in ("key", "value"))
    return {kv_scale_name(*place): torch.ones(shape) for place in places}


def even_folding(spec: DecoderSpec, recipe: Recipe) -> Folding:
    if recipe.integer_products is None:
        return NO_FOLDING
    inputs = [found for layer in range(spec.num_hidden_layers) for found in folded_inputs(layer)]
    return Folding.of_inputs(
        {
            found: torch.ones(spec.intermediate_size if "up_proj" in found.divided else spec.hidden_size)
            for found in inputs
        }
    )


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ("int8", {}),
        ("int8", {"precision": "int8", "int8_kv_cache": True, "prefill": True}),
        ("fp16", {"precision": "fp16"}),
        ("int4", {"precision": "int4", "int8_kv_cache": True}),
        ("int4", {"precision": "int4"}),
        ("int4 --recipe rtn", {"precision": "int4", "recipe": "rtn"}),
        ("int4 --recipe awq-mixed", {"precision": "int4", "recipe": "awq-mixed"}),
        ("int4 --recipe gptq", {"precision": "int4", "recipe": "gptq"}),
        ("int4 --recipe gptq-mixed", {"precision": "int4", "recipe": "gptq-mixed"}),
        ("int4 --prefill int8", {"precision": "int4", "prefill": True}),
        ("tensorrt bf16", {"target": "tensorrt"}),
        ("tensorrt int4", {"target": "tensorrt", "precision": "int4"}),
    ],
)
def test_what_inspect_tells_is_what_an_export_writes(
    tmp_path: Path, told: str, options: dict[str, Any]
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "c", **ODD, num_key_value_heads=5)
    if "gptq" in options.get("recipe", ""):
        text = tmp_path / "text.txt"
        text.write_text("What the model reads. " * 40)
        options = {**options, "calibrate": str(text)}
    folder = export(
        str(checkpoint), ExportOptions(output=tmp_path / "m", verify=False, **options), QUIET
    ).folder
    assert describe(checkpoint).weight_bytes[told] == sum(written(folder).values())


def test_what_does_not_fit_a_model_has_no_forecast(tmp_path: Path) -> None:
    told = describe(make_tiny_checkpoint(tmp_path / "c", hidden_size=40, head_dim=16)).weight_bytes
    assert told["int4"] is told["int8"] is told["tensorrt int4"] is None
    assert told["fp32"] is not None
    assert told["tensorrt bf16"] is not None


def test_heads_that_onnx_runtime_has_no_attention_for_are_refused_before_any_work(tmp_path: Path) -> None:
    """The export wrote its graph, and then ended with ONNX Runtime's own words."""
    checkpoint = make_tiny_checkpoint(tmp_path / "c", head_dim=8)
    for precision in ("fp32", "int8", "int4"):
        with pytest.raises(QconvertError, match="heads have 8 channels") as refused:
            export(str(checkpoint), ExportOptions(precision=precision, output=tmp_path / "m"), QUIET)
        assert refused.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"c"}
    told = describe(checkpoint).weight_bytes
    assert told["fp32"] is told["int8"] is None
    assert told["tensorrt bf16"] is not None
