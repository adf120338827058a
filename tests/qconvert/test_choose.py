"""What the options of an export mean, and which do not fit one another: refused before any work.

If these fail, an export ignores an option that it was given, or fails after minutes of work.
"""

from __future__ import annotations

import pytest

from qconvert.errors import QconvertError
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.choose import Wishes, choose
from qconvert.targets import TARGETS

SPEC = DecoderSpec(3, 4, 2, 16, 64, 128, 320, 1e-6, True, 256, (None, None, None))


@pytest.mark.parametrize(
    ("target", "wishes", "message"),
    [
        ("onnxruntime", Wishes("bf16"), "--precision bf16 is not for --target onnxruntime"),
        ("tensorrt", Wishes("int8"), "--precision int8 is not for --target tensorrt"),
        # These two had no blocks and exported as if the option had not been given.
        ("onnxruntime", Wishes("fp32", 32), "--block-size 32 is for weights in blocks, and --precision fp32"),
        ("tensorrt", Wishes("bf16", 32), "--block-size 32 is for weights in blocks, and --precision bf16"),
        ("tensorrt", Wishes("int4", 256), "blocks of 256 weights do not fit"),
        ("onnxruntime", Wishes("int8", recipe="gptq"), "--recipe gptq is for --precision int4"),
        ("onnxruntime", Wishes("fp16", calibrate="default"), "--recipe gptq is for --precision int4"),
        ("tensorrt", Wishes("int4", recipe="gptq-mixed"), "--recipe gptq-mixed is for --precision int4 and"),
        ("onnxruntime", Wishes("int4", recipe="rtn", calibrate="default"), "needs no calibration text"),
        ("onnxruntime", Wishes("int4", recipe="awq"), "unknown recipe 'awq'"),
        ("onnxruntime", Wishes("fp32", prefill=True), "--prefill int8 is not for --target onnxruntime"),
        ("onnxruntime", Wishes("int8", prefill=True), "--prefill int8 is not for --target onnxruntime"),
        ("tensorrt", Wishes("int4", prefill=True), "--prefill int8 is not for --target tensorrt"),
        (
            "onnxruntime",
            Wishes("fp16", int8_kv_cache=True),
            "--kv-cache int8 is not for --target",
        ),
        ("tensorrt", Wishes("fp32", int8_kv_cache=True), "--kv-cache int8 is not for --target tensorrt"),
    ],
)
def test_options_that_do_not_fit_are_refused(target: str, wishes: Wishes, message: str) -> None:
    with pytest.raises(QconvertError, match=message) as refused:
        choose(wishes, TARGETS[target].capabilities, SPEC)
    assert refused.value.hint


def test_a_calibration_text_asks_for_gptq() -> None:
    capabilities = TARGETS["onnxruntime"].capabilities
    choice = choose(Wishes("int4", calibrate="default"), capabilities, SPEC)
    assert (choice.name, choice.calibrated) == ("int4-gptq", True)
    assert choice == choose(Wishes("int4", recipe="gptq"), capabilities, SPEC)
    assert not choose(Wishes("int4"), capabilities, SPEC).calibrated
