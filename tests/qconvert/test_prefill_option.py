"""If these fail, ``--prefill`` is taken where no second graph makes sense, or is silently dropped."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from qconvert.cli import main


@pytest.mark.parametrize(
    "options",
    [["--precision", "fp32"], ["--precision", "fp16"], ["--target", "tensorrt", "--precision", "int4"]],
    ids=str,
)
def test_a_precision_without_use_for_it_is_refused(tied, tmp_path, options):
    output = tmp_path / "m"
    result = CliRunner().invoke(main, ["export", str(tied), "--prefill", "int8", "-o", str(output), *options])
    assert result.exit_code == 1
    assert "--prefill int8 is not for" in result.output
    assert "--precision int4" in result.output
    assert not output.exists()


def test_the_recipe_and_the_second_graph_stand_in_the_folder(tied, tmp_path):
    output = tmp_path / "m"
    arguments = ["export", str(tied), "--precision", "int4", "--prefill", "int8", "-o", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((output / "qconvert.json").read_text())
    assert facts["recipe"]["prefill"] == {"mlp_parts": 2, "mlp_groups": 2, "smoothing": 0.65}
    assert facts["graph"]["prefill"]["file"] == "prefill.onnx"
    assert facts["verification"]["status"] == "passed"
