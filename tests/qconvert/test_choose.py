"""What the options of an export mean, and which do not fit one another: refused before any work.

If these fail, an export ignores an option that it was given, or fails after minutes of work.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from qconvert.errors import QconvertError
from qconvert.formats import columns
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.choose import RECIPES, Wishes, choose
from qconvert.targets import TARGETS
from tests.qconvert.combinations import Combination, accepted, distinct, offered

SPEC = DecoderSpec(3, 4, 2, 16, 64, 128, 320, 1e-6, True, 256, (None, None, None))
PARTS = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


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
        ("tensorrt", Wishes("int4", recipe="gptq"), "--recipe gptq is for --target onnxruntime"),
        ("tensorrt", Wishes("int4", calibrate="default"), "--recipe gptq is for --target onnxruntime"),
        ("tensorrt", Wishes("int4", recipe="gptq-mixed"), "--recipe gptq-mixed is for --target onnxruntime"),
        ("onnxruntime", Wishes("int4", recipe="rtn", calibrate="default"), "needs no calibration text"),
        ("onnxruntime", Wishes("int4", recipe="hqq"), "unknown recipe 'hqq'"),
        ("onnxruntime", Wishes("int8", recipe="awq"), "--recipe awq is for --precision int4"),
        ("tensorrt", Wishes("bf16", recipe="awq"), "--recipe awq is for --precision int4"),
        ("tensorrt", Wishes("int4", recipe="awq-mixed"), "--recipe awq-mixed is for --target onnxruntime"),
        ("onnxruntime", Wishes("fp32", prefill=True), "--prefill int8 is not for --target onnxruntime"),
        ("onnxruntime", Wishes("int8", prefill=True), "--prefill int8 is not for --target onnxruntime"),
        ("tensorrt", Wishes("int4", prefill=True), "--prefill int8 is not for --target tensorrt"),
        (
            "onnxruntime",
            Wishes("fp16", int8_kv_cache=True),
            "--kv-cache int8 is not for --target",
        ),
        ("onnxruntime", Wishes("int8", int8_head=True), "--head int8 is for checkpoints whose own codes"),
        ("tensorrt", Wishes(int8_head=True), "--head int8 is for checkpoints whose own codes are kept"),
        ("tensorrt", Wishes("fp32", int8_kv_cache=True), "--kv-cache int8 is not for --target tensorrt"),
    ],
)
def test_options_that_do_not_fit_are_refused(target: str, wishes: Wishes, message: str) -> None:
    with pytest.raises(QconvertError, match=message) as refused:
        choose(wishes, TARGETS[target].capabilities, SPEC)
    assert refused.value.hint


def fits(combination: Combination) -> bool:
    """What the capabilities of targets say, for a model that every block size divides."""
    target, wishes = TARGETS[combination.target].capabilities, combination.wishes
    packed = wishes.precision in ("int8", "int4")
    in_blocks = wishes.precision == "int4" or wishes.block_size is not None
    slow = in_blocks or wishes.int8_kv_cache
    recipes = (None, "rtn", "awq") if target.packed_columns else (None, *RECIPES)
    return (
        wishes.precision in target.precisions
        and (packed or wishes.block_size is None)
        and (not target.packed_columns or wishes.block_size in (None, *columns.BLOCK_SIZES))
        and (wishes.recipe in (None, "rtn") or (target.calibrated and wishes.precision == "int4"))
        and wishes.recipe in recipes
        and (not wishes.prefill or (target.integer_products and packed and slow))
        and (not wishes.int8_kv_cache or (target.int8_kv_cache and wishes.precision != "fp16"))
    )


def test_what_is_accepted_follows_from_the_capabilities() -> None:
    spec = replace(SPEC, hidden_size=256, num_attention_heads=16, intermediate_size=512)
    assert accepted(spec) == [combination for combination in offered() if fits(combination)]
    by_target = Counter(combination.target for combination in distinct(accepted(spec), spec))
    assert by_target == {"onnxruntime": 149, "tensorrt": 13}


def test_a_calibration_text_asks_for_gptq() -> None:
    capabilities = TARGETS["onnxruntime"].capabilities
    choice = choose(Wishes("int4", calibrate="default"), capabilities, SPEC)
    assert (choice.name, choice.calibrated) == ("int4-gptq", True)
    assert choice == choose(Wishes("int4", recipe="gptq"), capabilities, SPEC)
    assert choose(Wishes("int4"), capabilities, SPEC).method == "awq"


def test_four_bits_are_calibrated_where_the_checkpoint_can_read_a_text() -> None:
    """Without a tokenizer, tokens would be random: what they say of activations is not what text says."""
    ours, theirs = TARGETS["onnxruntime"].capabilities, TARGETS["tensorrt"].capabilities
    plain = choose(Wishes("int4"), ours, SPEC)
    assert (plain.name, plain.method) == ("int4", "awq")
    assert plain == choose(Wishes("int4", recipe="awq"), ours, SPEC)
    fallen = choose(Wishes("int4"), ours, SPEC, reads_text=False)
    assert (fallen.name, fallen.method) == ("int4-rtn", None)
    assert fallen == choose(Wishes("int4", recipe="rtn"), ours, SPEC)
    with pytest.raises(QconvertError, match="no tokenizer for"):
        choose(Wishes("int4", recipe="awq"), ours, SPEC, reads_text=False)
    for precision in ("fp32", "int8"):
        assert choose(Wishes(precision), ours, SPEC).name == precision
    found = choose(Wishes("int4"), theirs, SPEC)
    assert (found.name, found.method) == ("int4", "awq")
    assert choose(Wishes("int4"), theirs, SPEC, reads_text=False).name == "int4-rtn"


@pytest.mark.parametrize(("recipe", "down", "query"), [("awq", 128, 256), ("gptq", 64, 32)])
def test_calibrated_weights_have_short_blocks_where_inputs_are_uneven(
    recipe: str, down: int, query: int
) -> None:
    """With 256 weights a block in down_proj the sample lost a sixth more to rounding than with 64."""
    target = TARGETS["onnxruntime"].capabilities
    spec = replace(SPEC, hidden_size=1536, num_attention_heads=96, intermediate_size=8960)
    made = choose(Wishes("int4", recipe=recipe), target, spec).recipe
    assert made.linear is not None
    sizes = {
        part: getattr(made.format_of(f"model.layers.0.{part}.weight"), "block_size", None) for part in PARTS
    }
    assert sizes == {"self_attn.o_proj": 256, "mlp.up_proj": 256, "mlp.down_proj": down}
    for part in "qkv":
        fmt = made.format_of(f"model.layers.0.self_attn.{part}_proj.weight")
        assert getattr(fmt, "block_size", None) == query
    asked = choose(Wishes("int4", 256, recipe=recipe), target, spec).recipe
    assert getattr(asked.format_of("model.layers.0.mlp.down_proj.weight"), "block_size", None) == 256


def test_a_large_model_reads_half_of_the_text_for_awq_and_all_of_it_for_gptq() -> None:
    large = replace(SPEC, hidden_size=4096, intermediate_size=16384, num_hidden_layers=32, head_size=128)
    large = replace(large, num_attention_heads=32, num_key_value_heads=8, sliding_windows=(None,) * 32)
    tokens = {
        (recipe, spec.hidden_size): choose(
            Wishes("int4", recipe=recipe), TARGETS["onnxruntime"].capabilities, spec
        ).tokens
        for recipe in ("awq", "gptq")
        for spec in (SPEC, large)
    }
    assert tokens == {("awq", 64): 4096, ("awq", 4096): 2048, ("gptq", 64): 16384, ("gptq", 4096): 16384}
