"""If these fail, ``--prefill`` is taken where no second graph makes sense, or is silently dropped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from qconvert.cli import main
from qrun.backends.opening import open_session
from qrun.decoding.generate import Context


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


def test_int8_with_a_cache_of_8_bits_shares_its_weights_with_a_second_graph(tied, tmp_path):
    output = tmp_path / "m"
    options = ["--precision", "int8", "--prefill", "int8", "--kv-cache", "int8"]
    result = CliRunner().invoke(main, ["export", str(tied), *options, "-o", str(output)])
    assert result.exit_code == 0, result.output
    facts = json.loads((output / "qconvert.json").read_text())
    assert facts["recipe"]["prefill"] == facts["recipe"]["linear"]
    assert facts["verification"]["status"] == "passed"
    assert (output / "prefill.onnx").is_file()
    assert not (output / "prefill.onnx.data").exists()


def test_both_graphs_of_int8_give_the_same_bits(tied, tmp_path):
    """What the second graph reads is what the first one would have read: codes and all that follows."""
    output = tmp_path / "m"
    options = ["--precision", "int8", "--prefill", "int8", "--kv-cache", "int8", "--no-verify"]
    assert CliRunner().invoke(main, ["export", str(tied), *options, "-o", str(output)]).exit_code == 0
    texts = np.random.default_rng(0).integers(0, 256, (10, 40)).tolist()
    found = []
    for prefill_graph in (True, False):
        session = open_session(output, prefill_graph=prefill_graph)
        logits = []
        for ids in texts:
            context = Context(session)
            context.feed(ids[:24], logits="none")
            logits.append(context.feed(ids[24:], logits="last").copy())
        found.append(logits)
    assert np.abs(found[0]).max() > 0.1
    # Their attention adds up in another order: a number between two codes may become either, in some texts.
    assert sum(np.array_equal(*both) for both in zip(*found, strict=True)) >= 5
    np.testing.assert_allclose(*found, atol=0.2)
