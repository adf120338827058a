"""Every combination of options that the command line accepts is exported and proven, with a real vocabulary.

So none ends in a traceback after minutes of work, as ``--recipe gptq`` did for every vocabulary from 4,096
tokens on. ``make test-matrix`` runs all of them, ``make test`` the representative ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import qconvert.export as flow
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.lowering.forecast import data_bytes
from qconvert.models.spec import DecoderSpec
from qconvert.progress import Progress
from qconvert.targets import TARGETS
from qrun.folder.manifest import read_manifest
from tests.qconvert.combinations import Combination, accepted, distinct, offered
from tests.tiny import WIDE_RANGE, make_tiny_checkpoint

QUIET = Progress(quiet=True)
# Qwen2.5's vocabulary, and little else: most of the time goes into comparing 151,936 logits a position.
NARROW = DecoderSpec(2, 2, 1, 16, 32, 64, 151_936, 1e-6, True, 32, (None, None))
# Where blocks of up to 128 must divide every matrix.
WIDE = replace(NARROW, num_attention_heads=8, hidden_size=128, intermediate_size=256)
REPRESENTATIVE = {
    "--target onnxruntime --precision int8 --prefill int8 --kv-cache int8",
    "--target onnxruntime --precision int4 --prefill int8 --kv-cache int8",
    "--target onnxruntime --precision int4 --recipe gptq --prefill int8 --kv-cache int8",
    "--target tensorrt --precision int4",
}
EVERY = [
    pytest.param(each, id=str(each), marks=() if str(each) in REPRESENTATIVE else pytest.mark.matrix)
    for each in distinct(accepted(WIDE), WIDE)
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DecoderSpec], Path]:
    folder = tmp_path_factory.mktemp("matrix")

    @cache
    def of(spec: DecoderSpec) -> Path:
        return make_tiny_checkpoint(
            folder / f"checkpoint-{spec.hidden_size}",
            vocab_size=spec.vocab_size,
            num_hidden_layers=spec.num_hidden_layers,
            num_attention_heads=spec.num_attention_heads,
            num_key_value_heads=spec.num_key_value_heads,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            max_position_embeddings=spec.context_length,
            **({"initializer_range": WIDE_RANGE} if spec.hidden_size >= WIDE.hidden_size else {}),
        )

    return of


def options_of(combination: Combination, output: Path, text: str) -> ExportOptions:
    wishes = combination.wishes
    return ExportOptions(
        **{**vars(wishes), "calibrate": None if wishes.recipe in (None, "rtn") else text},
        target=combination.target,
        output=output,
    )


@pytest.mark.parametrize("combination", EVERY)
def test_it_is_exported_and_proven(
    checkpoints: Callable[[DecoderSpec], Path], text: str, output: Path, combination: Combination
) -> None:
    spec = NARROW if combination in set(accepted(NARROW)) else WIDE
    made = export(str(checkpoints(spec)), options_of(combination, output, text), QUIET)
    assert made.report is not None
    assert made.report.passed
    manifest = read_manifest(output)
    assert manifest.verification == "passed"
    assert manifest.model.vocab_size == spec.vocab_size == 151_936
    assert (manifest.prefill_path is not None) is combination.wishes.prefill
    assert (manifest.kv.dtype == "int8") is combination.wishes.int8_kv_cache
    target = TARGETS[combination.target]
    forecast = data_bytes(target.lower, target.fit(spec, None), combination.recipe(spec))
    assert forecast == {file.name: file.stat().st_size for file in output.glob("*.data")}


def test_representative_ones_are_among_them() -> None:
    assert {str(combination) for combination in accepted(WIDE)} > REPRESENTATIVE


@pytest.mark.matrix
def test_all_others_are_refused_before_the_work(
    checkpoints: Callable[[DecoderSpec], Path], text: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "load_model", lambda _: pytest.fail("the work has begun"))
    checkpoint, known, refused = checkpoints(WIDE), set(accepted(WIDE)), 0
    for combination in offered():
        if combination in known:
            continue
        with pytest.raises(QconvertError) as error:
            export(str(checkpoint), options_of(combination, output, text), QUIET)
        assert error.value.hint, combination
        assert not output.exists()
        refused += 1
    assert refused > 500
