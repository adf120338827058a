"""The number formats of weights, and the ``Recipe`` that says which weight takes which.

Block formats are those of ONNX Runtime's ``MatMulNBits``: a weight ``[N, K]`` is cut along K into
blocks that share one scale (and a zero point).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

BLOCK_SIZES = (16, 32, 64, 128, 256)
# Channels of the MLP that integer products compute at once: longer parts leave the processor's cache, shorter
# ones are more operators. A 0.5B model (4,864) reads prompts 1.04 to 1.08 times as fast in 2 parts as in 4, a
# 1.5B model (8,960) no faster in 2 than in 4.
LONGEST_PART = 3072
# Least number of groups of the MLP's channels in a graph for prompts: beside 4-bit weights, more gain
# nothing (mean KL of the sample after a prompt: 0.331 with 8, 0.333 with 2), and cost 5% of the speed.
PROMPT_GROUPS = 2
# Codes of a matrix in halves, relative to zero. Beyond +119 the upper half would not fit into 4 bits.
LOWEST_HALVES, HIGHEST_HALVES = -128, 119


@dataclass(frozen=True)
class BlockFormat:
    """``bits`` 4 or 8; ``block_size`` weights share a scale; asymmetric adds a zero point to each block.

    ``scale_dtype`` is the type in which scales are stored: float32, or bfloat16, which ONNX Runtime
    turns into float32 when it loads the model. ``halves`` stores 8 bits as two matrices of 4 (``halves.py``);
    scales are then negative where a block's largest value is positive. ``residuals`` adds a float32 to all
    weights of a block, for formats whose zero points are no whole numbers (GGUF's Q4_1 and Q5_1).
    """

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: str = "float32"
    halves: bool = False
    residuals: bool = False

    def step(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The step of blocks whose values lie between ``low`` and ``high``; 0 for a block of zeros.

        A symmetric step is max|w| / (2^(bits-1) - 1). In halves the end of larger magnitude gets the 128
        codes below zero, the other the 119 above. An asymmetric step is the block's range, 0 included, /
        (2^bits - 1). NaN and Inf stay what they are.
        """
        import torch

        if self.halves:
            ends = torch.stack((high, -low))
            return torch.maximum(ends.amax(0) / -LOWEST_HALVES, ends.amin(0) / HIGHEST_HALVES)
        if self.symmetric:
            return torch.maximum(high, -low) / ((1 << (self.bits - 1)) - 1)
        return (high.clamp(min=0) - low.clamp(max=0)) / ((1 << self.bits) - 1)


# How a text decides what weights are rounded to: ``calibration/gptq``, ``awq.py``, ``integers.py``.
Method = Literal["gptq", "awq", "compensated"]


@dataclass(frozen=True)
class Calibration:
    """On which text weights were rounded, and how: its name, SHA-256 of its token ids, their number."""

    text: str
    sha256: str
    tokens: int
    method: Method = "gptq"


@dataclass(frozen=True)
class ChannelFormat:
    """8 bits with one scale per output channel, for products of integers with integers.

    Activations become 8-bit integers too, with one scale per token. The MLP's intermediate channels are
    computed in ``mlp_parts``, one after the other, so that a part stays in the processor's cache, and
    ``mlp_groups`` of them have scales of their own, both as activations and as weights of ``down_proj``: an
    outlier spoils the resolution of its own group only. Mean KL of the sample over prose, code and German:
    0.0113 with 4 groups of activations, 0.0105 if they are the weights' as well, 0.0093 with 8.

    ``smoothing`` (0 to 1) is how much of the inputs' unevenness is folded into weights; None: nothing. See
    ``calibration/smoothing.py``. Mean KL on prose: 0.026 without, 0.0069 with 0.65 (0.0077 with 0.5 for
    ``down_proj``; weights alone cost 0.0032), with 4 groups.
    """

    mlp_parts: int = 4
    mlp_groups: int = 8
    smoothing: float | None = 0.65

    def fitted(self, channels: int) -> ChannelFormat:
        """The same with as few parts as stay within ``LONGEST_PART`` of the MLP's ``channels``."""
        parts = 2
        while channels > parts * LONGEST_PART:
            parts *= 2
        return replace(self, mlp_parts=parts, mlp_groups=max(parts, self.mlp_groups))


@dataclass(frozen=True)
class Kept:
    """How a matrix is stored that the checkpoint holds in codes already: these codes, bit for bit.

    Attributes:
        fmt: its blocks. Longer groups of the checkpoint's are several blocks with one scale.
        order: names the order of inputs in which its columns are stored (``order_name``); None: as they come.
    """

    fmt: BlockFormat
    order: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How one export treats its weights. It stands in the manifest as it is; ``kept`` is told in groups.

    ``linear`` and ``head`` are None where weights keep the activations' type. ``head`` is the format
    of the embedding as well: a tied one is stored once. ``prefill`` is the format of the linear layers
    in a second graph that reads prompts only, or None where one graph does both. With a ``shortlist`` logits
    are computed from the upper halves of the head's weights, and again from all of them for that many of the
    likeliest tokens (``lowering/ort/shortlist.py``). With ``head_residual`` the head multiplies what rounding
    its input to 8 bits leaves as well (``lowering/ort/residual.py``). ``exceptions`` are
    formats of single kinds of linear weights (``down_proj``). With a ``calibration``, 4-bit weights, or
    those of integer products where ``linear`` is their format, are rounded on its text (see ``Method``); all
    others, and without it all, are rounded to nearest. ``kv_cache`` is None
    where keys and values keep the activations' type. ``kept`` are matrices, by their names in the checkpoint,
    whose codes it gives.
    """

    precision: str
    activations: str
    linear: BlockFormat | ChannelFormat | None
    head: BlockFormat | None
    accuracy_level: int = 4  # MatMulNBits may quantise activations to int8, block by block
    prefill: ChannelFormat | None = None
    shortlist: int | None = None
    head_residual: bool = False
    exceptions: Mapping[str, BlockFormat] = field(default_factory=dict)
    calibration: Calibration | None = None
    kv_cache: Literal["int8"] | None = None
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def format_of(self, name: str) -> BlockFormat | None:
        """The blocks of a linear weight in the graph that decodes, by its name in the checkpoint."""
        if name in self.kept:
            return self.kept[name].fmt
        special = (fmt for part, fmt in self.exceptions.items() if f".{part}." in name)
        fmt = next(special, self.linear)
        assert not isinstance(fmt, ChannelFormat), "integer products are lowered in lowering/ort/integers.py"
        return fmt

    @property
    def kv_dtype(self) -> str:
        """Type of the keys and values in the cache."""
        return self.kv_cache or self.activations

    @property
    def integer_products(self) -> ChannelFormat | None:
        """The format of the graph of integer products, if there is one."""
        return self.linear if isinstance(self.linear, ChannelFormat) else self.prefill

    def to_json(self) -> dict[str, Any]:
        found: dict[tuple[BlockFormat, bool], int] = {}
        for kept in self.kept.values():
            key = (kept.fmt, kept.order is not None)
            found[key] = found.get(key, 0) + 1
        told = [
            {**asdict(fmt), "ordered": ordered, "tensors": count} for (fmt, ordered), count in found.items()
        ]
        return {**asdict(replace(self, kept={})), "kept": told}
