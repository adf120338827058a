"""How far an export may be from PyTorch: the one table of limits, each with its reason.

``docs/verification.md`` prints the same table; a test compares the two. "checkpoint" is PyTorch with
the checkpoint's weights, "own weights" PyTorch with the weights as the export stores them: the second
comparison does not feel how coarse the weights are, so its limits stay sharp at 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Against = Literal["checkpoint", "own weights", "sharp twin"]
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
CALIBRATED = "int4 gptq"
BALANCED = "int4 awq"
FOUR_BITS = ("int4", BALANCED, CALIBRATED)
# The codes are the checkpoint's: what is rounded are activations, and what the head may be stored in.
KEPT = "kept"
# The column for fp32 with an int8 KV cache: only the cache rounds. In other precisions weights cost more.
FP32_INT8_KV = "fp32, int8 KV"
COLUMNS = (*PRECISIONS, BALANCED, CALIBRATED, KEPT, FP32_INT8_KV)
# With fewer positions one token decides over a share, a perplexity or a mean.
ENOUGH_FOR_SHARES = 100
ENOUGH_FOR_MEANS = 20


@dataclass(frozen=True)
class Limit:
    """One row of the table.

    Attributes:
        key: what is limited: a measure of ``compare.Measures``, "weight_steps" or "near_tie".
        title: the same for people.
        against: with what the export is compared.
        values: by precision; a precision that is not named has no such limit.
        reason: why these numbers.
        positions: fewest positions from which the measure is judged.
    """

    key: str
    title: str
    against: Against
    values: Mapping[str, float]
    reason: str
    positions: int = 1

    @property
    def minimum(self) -> bool:
        """The measure must be at least the value, not at most."""
        return self.key == "top1"

    def breaks(self, value: float, precision: str) -> bool:
        """Whether a measured value violates the limit; NaN always does."""
        limit = self.values.get(precision)
        if limit is None:
            return False
        return not (value >= limit if self.minimum else value <= limit)


LIMITS = (
    Limit(
        "weight_steps",
        "error of any weight, in rounding steps of its block",
        "checkpoint",
        {
            FP32_INT8_KV: 0.0,
            "fp32": 0.0,
            "fp16": 0.0,
            "bf16": 0.0,
            "int8": 0.501,
            "int4": 0.501,
            BALANCED: 0.501,
            CALIBRATED: 0.501,
            KEPT: 0.501,
        },
        "Rounding to nearest leaves half a step at most, and 0.001 is room for float32 arithmetic. "
        "Scales in bfloat16 (TensorRT's int4) make a step longer by their own rounding, 1/256. "
        "A weight that is not quantised is the checkpoint's, cast: nothing is left to chance. So is one "
        "whose codes are kept; there the limit is that of embedding and head.",
    ),
    Limit(
        "moved_steps",
        "the same of a matrix that a calibration has rounded, largest of each block, mean over the blocks",
        "checkpoint",
        {"int8": 3.0, BALANCED: 3.0, CALIBRATED: 5.0},
        "GPTQ moves weights on purpose, single ones by up to 17 steps, where the inputs do not feel it. "
        "The sample's matrices have 2.1 at most, tiny random models 1.9; rows in each other's place have "
        "more than 5. In groups of balanced columns it moves them less: 1.4 on the sample, 1.8 at most on "
        "random models, as in int8. Matrices of 8 bits that make up for those of 4: in steps of 4 bits. A "
        "single wrong weight is found all the same: what was solved is recorded bit by bit.",
    ),
    Limit(
        "common_steps",
        "the same: how far a row or a column is off as a whole",
        "checkpoint",
        {"int8": 0.3, BALANCED: 0.75, CALIBRATED: 0.75},
        "A mean hides a factor that was folded into one matrix and not into the other: it makes a "
        "row or a column longer as a whole, by 1 step and more for twice the factor. Rounding leaves 0.42 at "
        "most on the sample and 0.36 on random models, in columns so small that they are rounded away; gptq "
        "0.46, int8 0.15; 8 bits that make up for 4 0.96, and twice the limit is theirs.",
    ),
    Limit(
        "kv_above",
        "int8 KV cache: largest key or value over the largest that its scale can store",
        "checkpoint",
        {FP32_INT8_KV: 3.0, "int8": 3.0, "int4": 3.0, BALANCED: 3.0, CALIBRATED: 3.0, KEPT: 3.0},
        "Scales come from a calibration text and leave a tenth of room; what is beyond is cut off. These "
        "texts reach 1.5 in channels of the sample, 1.6 in random models. PyTorch with the export's own "
        "scales would share a wrong one: it is found here.",
    ),
    Limit(
        "kv_below",
        "int8 KV cache: what a channel's scale can store over its largest key or value",
        "checkpoint",
        {FP32_INT8_KV: 10.0, "int8": 10.0, "int4": 10.0, BALANCED: 10.0, CALIBRATED: 10.0, KEPT: 10.0},
        "A scale that is too large wastes the 8 bits. The sample's largest ratio is 3.1, that of random "
        "models 1.7: these texts are shorter than the calibration's.",
    ),
    Limit(
        "second_step",
        "logits in two steps: share of the second step that is missing",
        "own weights",
        {"int4": 0.2, BALANCED: 0.2, CALIBRATED: 0.2},
        "Without it, or done to other tokens, the share is 1. Where it is right, rounding in the layers "
        "before leaves 0.06 on the sample (rounded to nearest or by GPTQ) and 0.07 at most on random models, "
        "1.3e-4 on the sample.",
    ),
    Limit(
        "twin_difference",
        "sharp twin: largest difference of any logit",
        "own weights",
        dict.fromkeys((FP32_INT8_KV, "fp32", "fp16", "bf16", "int8", *FOUR_BITS, KEPT), 1e-3),
        "As sharp as fp32, for what is left is the order of sums: 4e-5 at most on random models, "
        "1.3e-4 on the sample. In fp32 the twin is the graph itself, and reads texts side by side.",
    ),
    Limit(
        "mean_rounding",
        "what rounding costs: mean KL divergence of the graph from its sharp twin, nats",
        "sharp twin",
        {
            FP32_INT8_KV: 3e-3,
            "fp16": 5e-4,
            "bf16": 5e-3,
            "int8": 0.05,
            "int4": 0.05,
            BALANCED: 0.05,
            CALIBRATED: 0.05,
            KEPT: 0.05,
        },
        "Of activations, and of keys and values in an int8 KV cache: "
        "the twin shows that nothing else is left. The sample has 0.009 in int8 and 0.016 in int4.",
    ),
    Limit(
        "max_rounding",
        "the same of one token",
        "sharp twin",
        {
            FP32_INT8_KV: 0.03,
            "fp16": 0.01,
            "bf16": 0.05,
            "int8": 0.5,
            "int4": 0.5,
            BALANCED: 0.5,
            CALIBRATED: 0.5,
            KEPT: 0.5,
        },
        "A mean hides one bad position, as above. Random models have 0.03 at most with an int8 KV cache.",
    ),
    Limit(
        "max_difference",
        "largest difference of any logit",
        "checkpoint",
        {"fp32": 1e-3},
        "Two correct float32 programs differ by the order of their sums: 1.5e-4 at most on the sample. "
        "Coarser types have no such bound that would mean something for one logit among 150,000.",
    ),
    Limit(
        "mean_kl",
        "mean KL divergence per token, nats",
        "own weights",
        {
            FP32_INT8_KV: 3e-3,
            "fp16": 5e-4,
            "bf16": 5e-3,
            "int8": 0.05,
            "int4": 0.05,
            BALANCED: 0.05,
            CALIBRATED: 0.05,
            KEPT: 0.05,
        },
        "What activations lose in float16 (1.5e-5 on the sample), bfloat16 (1.5e-3) or as int8 blocks inside "
        "MatMulNBits (0.006 in blocks of 32, 0.03 in blocks of 256). With an int8 KV cache PyTorch rounds "
        "keys and values as well; where sums in another order change a code, the sample loses 5e-4. "
        "Wrong angles, heads or cache lengths cost far more. "
        "Judged from 20 positions on.",
        ENOUGH_FOR_MEANS,
    ),
    Limit(
        "max_kl",
        "largest KL divergence of one token, nats",
        "own weights",
        {
            FP32_INT8_KV: 0.03,
            "fp16": 0.01,
            "bf16": 0.05,
            "int8": 0.5,
            "int4": 0.5,
            BALANCED: 0.5,
            CALIBRATED: 0.5,
            KEPT: 0.5,
        },
        "A mean hides one bad position, such as the one after a chunk's boundary. The sample has 4e-4 in "
        "fp16, 5e-3 with an int8 KV cache, 9e-3 in bf16, 0.05 in blocks of 32 and 0.25 in blocks of 256.",
    ),
    Limit(
        "mean_kl",
        "mean KL divergence per token, nats",
        "checkpoint",
        {
            FP32_INT8_KV: 0.02,
            "fp16": 5e-4,
            "bf16": 5e-3,
            "int8": 0.05,
            "int4": 1.5,
            BALANCED: 0.75,
            CALIBRATED: 0.75,
            KEPT: 0.05,
        },
        "What the export costs in all. Where codes are kept that is what activations lose. "
        "An int8 KV cache costs the sample 0.0015 on prose and 0.003 "
        "elsewhere, random models up to 0.004. int8 costs the sample 0.006 on prose and 0.012 on Chinese, in "
        "blocks of 256 0.015 and 0.03; round-to-nearest int4 costs it 0.26 and 0.5, in blocks of 256 0.5 and "
        "0.8, and larger models far less. Beyond 1.5 little of a model is left. Judged from 20 positions on.",
        ENOUGH_FOR_MEANS,
    ),
    Limit(
        "top1",
        "share of tokens with the same first choice, at least",
        "checkpoint",
        {FP32_INT8_KV: 0.85, "fp16": 0.95, "bf16": 0.85, "int8": 0.8},
        "At worst, the sample has 0.99, 0.98 and 0.88, random models, where near ties abound, 0.97, 0.95 and "
        "0.86; with an int8 KV cache 0.94 and 0.93. int4 has no limit: it exchanges first choices that are "
        "close (0.34 agree on the sample in blocks of 256, 0.22 on a random model whose KL is 0.04), and KL "
        "weighs that rightly. Judged from 100 positions on.",
        ENOUGH_FOR_SHARES,
    ),
    Limit(
        "perplexity_ratio",
        "perplexity of the text over PyTorch's",
        "checkpoint",
        {
            FP32_INT8_KV: 1.05,
            "fp16": 1.01,
            "bf16": 1.02,
            "int8": 1.05,
            "int4": 2.5,
            BALANCED: 1.75,
            CALIBRATED: 1.75,
            KEPT: 1.05,
        },
        "A KL divergence does not tell better from worse. At worst, the sample has 1.00, 1.00, 1.03 and 1.8 "
        "(code, blocks of 256), and 1.01 with an int8 KV cache. "
        "Judged from 100 positions on, and not on random tokens.",
        ENOUGH_FOR_SHARES,
    ),
    Limit(
        "near_tie",
        "margin up to which another greedy token is a near tie, logits",
        "own weights",
        {
            FP32_INT8_KV: 0.3,
            "fp32": 2e-3,
            "fp16": 0.1,
            "bf16": 0.5,
            "int8": 1.0,
            "int4": 1.0,
            BALANCED: 1.0,
            CALIBRATED: 1.0,
            KEPT: 1.0,
        },
        "Two logits that may be off by 1e-3 each can change places when they are 2e-3 apart. The others: "
        "the largest margins seen on the sample and on random models are 0.01, 0.04, 0.4 and 0.7.",
    ),
)


def limit_value(key: str, precision: str) -> float:
    """The value of a limit that stands once in the table.

    Raises:
        KeyError: no such limit, or none for this precision.
    """
    (limit,) = (limit for limit in LIMITS if limit.key == key)
    return limit.values[precision]


def limits_name(
    precision: str, *, method: str | None = None, kv_dtype: str = "float32", kept: bool = False
) -> str:
    """The table's column for a folder.

    Args:
        precision: as in the manifest.
        method: of its calibration, if any (``recipe.Method``).
        kv_dtype: of its KV cache.
        kept: whether its codes are the checkpoint's.

    Raises:
        KeyError: an unknown method.
    """
    if kept:
        return KEPT
    if (precision, kv_dtype) == ("fp32", "int8"):
        return FP32_INT8_KV
    return {None: precision, "gptq": CALIBRATED, "awq": BALANCED, "compensated": "int8"}[method]


def limits_table() -> str:
    """The table in Markdown, as the documentation shows it."""
    lines = [
        f"| limit | compared with | {' | '.join(COLUMNS)} | reason |",
        f"|{'---|' * (len(COLUMNS) + 3)}",
    ]
    for limit in LIMITS:
        values = [f"{limit.values[name]:g}" if name in limit.values else "" for name in COLUMNS]
        lines.append(f"| {limit.title} | {limit.against} | {' | '.join(values)} | {limit.reason} |")
    return "\n".join(lines) + "\n"
