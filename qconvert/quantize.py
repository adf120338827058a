"""What becomes of each weight: a ``Recipe``, and pure functions that pack one tensor.

Block formats are those of ONNX Runtime's ``MatMulNBits``: a weight ``[N, K]`` is cut along K into
blocks that share one float32 scale (and a zero point); 4-bit values are packed two to a byte, the
earlier one in the low half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qconvert.errors import QconvertError
from qconvert.halves import HIGHEST, LOWEST

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Longer blocks are fewer bytes to read for a token. int4: a 0.5B model decodes 1.21 times as fast with 128 as
# with 32 (64: 1.10), a 1.5B model 1.04 times as fast with 256 as with 128. They cost the sample, rounded to
# nearest, a mean KL on prose of 0.302 (64: 0.254, 32: 0.243); 256 in down_proj takes the mean over prose,
# code and German from 0.456 to 0.488, with GPTQ from 0.161 to 0.164. int8: 0.006 with 64 (32: 0.004), and
# decode 1.2 to 1.4 times as fast.
DEFAULT_BLOCK_SIZES = {"int8": 64, "int4": 256}
# Of the head, which is the embedding too: a tenth of what is read.
_LONGEST_HEAD_BLOCK = 128
# Rows are packed in pieces of about this many weights: float32 temporaries then stay in the cache.
PIECE = 1 << 19


@dataclass(frozen=True)
class BlockFormat:
    """``bits`` 4 or 8; ``block_size`` weights share a scale; asymmetric adds a zero point to each block.

    ``scale_dtype`` is the type in which scales are stored: float32, or bfloat16, which ONNX Runtime
    turns into float32 when it loads the model. ``halves`` stores 8 bits as two matrices of 4 (``halves.py``);
    scales are then negative where a block's largest value is positive.
    """

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: str = "float32"
    halves: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales and zero points included."""
        scale_bits = 16 if self.scale_dtype == "bfloat16" else 32
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.block_size


@dataclass(frozen=True)
class Calibration:
    """On which text weights were rounded: its name for people, SHA-256 of its token ids, their number."""

    text: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class ChannelFormat:
    """8 bits with one scale per output channel, for products of integers with integers.

    Activations become 8-bit integers too, with one scale per token. The MLP's intermediate channels are
    computed in ``mlp_parts``, one after the other, so that a part stays in the processor's cache, and
    ``mlp_groups`` of them have scales of their own, both as activations and as weights of ``down_proj``: an
    outlier spoils the resolution of its own group only. Mean KL of the sample over prose, code and German:
    0.0113 with 4 groups of activations, 0.0105 if they are the weights' as well, 0.0093 with 8.

    ``smoothing`` (0 to 1) is how much of the inputs' unevenness is folded into weights, see ``smoothing.py``;
    None is nothing. Mean KL on prose: 0.026 without, 0.0069 with 0.65 (0.0077 with 0.5 for ``down_proj``;
    weights alone cost 0.0032), with 4 groups.
    """

    mlp_parts: int = 4
    mlp_groups: int = 8
    smoothing: float | None = 0.65

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight; the scales, one per thousands of weights, do not count."""
        return 8.0


@dataclass(frozen=True)
class Recipe:
    """How one export treats its weights. It stands in the manifest as it is.

    ``linear`` and ``head`` are None where weights keep the activations' type. ``head`` is the format
    of the embedding as well: a tied one is stored once. ``prefill`` is the format of the linear layers
    in a second graph that reads prompts only, or None where one graph does both. With a ``shortlist`` logits
    are computed from the upper halves of the head's weights, and again from all of them for that many of the
    likeliest tokens (``lowering/shortlist.py``). ``exceptions`` are
    formats of single kinds of linear weights (``down_proj``). With a ``calibration``, 4-bit weights are
    rounded by GPTQ on its text; all others, and without it all, are rounded to nearest. ``kv_cache`` is None
    where keys and values keep the activations' type.
    """

    precision: str
    activations: str
    linear: BlockFormat | ChannelFormat | None
    head: BlockFormat | None
    accuracy_level: int = 4  # MatMulNBits may quantise activations to int8, block by block
    prefill: ChannelFormat | None = None
    shortlist: int | None = None
    exceptions: Mapping[str, BlockFormat] = field(default_factory=dict)
    calibration: Calibration | None = None
    kv_cache: Literal["int8"] | None = None

    def format_of(self, name: str) -> BlockFormat | None:
        """The blocks of a linear weight in the graph that decodes, by its name in the checkpoint."""
        special = (fmt for part, fmt in self.exceptions.items() if f".{part}." in name)
        fmt = next(special, self.linear)
        assert not isinstance(fmt, ChannelFormat), "int8.py has the integer products"
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
        return asdict(self)


def recipe_for(precision: str, hidden_size: int, block_size: int | None = None) -> Recipe:
    """The recipe behind ``--precision`` and ``--block-size`` for a model of ``hidden_size``.

    Without a block size, the precision's own in ``DEFAULT_BLOCK_SIZES``; int8 then has blocks in its
    embedding and head alone, and integer products everywhere else.

    Raises:
        QconvertError: an unknown precision or block size, or a model that cannot be cut into blocks.
    """
    if precision not in PRECISIONS:
        raise QconvertError(f"unknown precision {precision!r}", hint=f"use one of {', '.join(PRECISIONS)}")
    integers = precision == "int8" and block_size is None
    if block_size is None:
        block_size = DEFAULT_BLOCK_SIZES.get(precision, BLOCK_SIZES[0])
    if block_size not in BLOCK_SIZES:
        raise QconvertError(
            f"unknown block size {block_size}", hint=f"use one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if precision in ("fp32", "fp16"):
        return Recipe(precision, {"fp32": "float32", "fp16": "float16"}[precision], None, None)
    # Rows of the embedding are looked up as they are stored: they must be whole blocks.
    longest = min(block_size, _LONGEST_HEAD_BLOCK)
    fitting = [size for size in BLOCK_SIZES if size <= longest and hidden_size % size == 0]
    if not fitting:
        raise QconvertError(
            f"hidden_size {hidden_size} is no multiple of {BLOCK_SIZES[0]}: the embedding cannot be packed",
            where="config.json: hidden_size",
            hint="use --precision fp32 or fp16",
        )
    head = BlockFormat(8, fitting[-1], symmetric=True)
    linear: BlockFormat | ChannelFormat
    if integers:
        linear = ChannelFormat()
    elif precision == "int8":
        linear = BlockFormat(8, block_size, symmetric=True)
    else:
        linear = BlockFormat(4, block_size, symmetric=False)
    return Recipe(precision, "float32", linear, head)


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight ``[N, K]`` in MatMulNBits' layout, with B = K / block_size rounded up.

    data: uint8 ``[N, B, block_size * bits / 8]``; scales: ``[N, B]`` in the format's type;
    zero_points: uint8 ``[N, ceil(B * bits / 8)]``, or None for a symmetric format.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


class NonFiniteWeightError(ValueError):
    """A weight holds NaN or Inf; the caller knows its name."""


def row_ranges(weight: torch.Tensor) -> Iterator[slice]:
    """Cut a tensor along its first axis into ranges of about ``PIECE`` elements."""
    rows = max(1, PIECE // weight[0].numel())
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def pack(weight: torch.Tensor, fmt: BlockFormat, workers: Executor | None = None) -> PackedWeight:
    """Quantise ``weight`` [N, K] (any float type) by rounding to nearest, block by block.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), zero at 2^(bits-1). In halves: the smallest scale of either
    sign with which codes reach from -128 to 119.
    Asymmetric: the block's range, widened to contain 0, is divided into 2^bits - 1 steps.

    Args:
        weight: the matrix.
        fmt: how to pack it.
        workers: threads that each take some rows (see ``parallel.piece_workers``); none: this one.

    Raises:
        NonFiniteWeightError: NaN or Inf in the weight.
    """
    import torch

    rows, columns = weight.shape
    blocks = -(-columns // fmt.block_size)
    padding = blocks * fmt.block_size - columns
    data = torch.empty((rows, blocks, fmt.block_size * fmt.bits // 8), dtype=torch.uint8)
    scales = torch.empty((rows, blocks), dtype=torch.float32)
    zeros = None if fmt.symmetric else torch.empty((rows, blocks), dtype=torch.uint8)

    def pack_rows(part: slice) -> None:
        values = weight[part].to(torch.float32)
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        values = values.view(-1, blocks, fmt.block_size)
        codes = _round_blocks(values, fmt, scales[part], None if zeros is None else zeros[part])
        data[part] = _pack_bits(codes, fmt.bits)

    for _ in (map if workers is None else workers.map)(pack_rows, row_ranges(weight)):
        pass  # waits for each piece, and raises what it raised
    zero_points = None if zeros is None else _pack_zero_points(zeros, fmt.bits)
    return PackedWeight(data, scales.to(getattr(torch, fmt.scale_dtype)), zero_points)


def _round_blocks(
    values: torch.Tensor, fmt: BlockFormat, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """uint8 codes of ``values`` [n, B, block]; fills ``scales`` and ``zeros`` [n, B]."""
    import torch

    low, high = torch.aminmax(values, dim=-1)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NonFiniteWeightError
    top = (1 << fmt.bits) - 1
    if zeros is None:
        middle = 1 << (fmt.bits - 1)
        if fmt.halves:
            turned = torch.where(high > -low, -1.0, 1.0)  # the larger end takes the larger side
            large, small = torch.maximum(high, -low), torch.minimum(high, -low)
            scales.copy_(_stored(torch.maximum(large / -LOWEST, small / HIGHEST), fmt) * turned)
            top = middle + HIGHEST
        else:
            scales.copy_(_stored(torch.maximum(high, -low).div_(middle - 1), fmt))
        offset: torch.Tensor | float = float(middle)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scales.copy_(_stored(torch.sub(high, low).div_(top), fmt))
        offset = torch.round(-low / scales).nan_to_num_(0.0).clamp_(0, top)
        zeros.copy_(offset)
        offset = offset.unsqueeze(-1)
    # A block of zeros has scale 0: any scale stores it exactly, so take 1 and avoid 0 / 0.
    scales.masked_fill_(scales == 0, 1.0)
    codes = values * scales.reciprocal().unsqueeze(-1)
    return codes.round_().add_(offset).clamp_(0, top).to(torch.uint8)


def _stored(steps: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """``steps`` as the format stores them: rounded up, so that the block's ends stay within its range."""
    import torch

    if fmt.scale_dtype == "float32":
        return steps
    # The upper half of a float32 is a bfloat16; adding 0xFFFF first rounds a positive one up.
    return ((steps.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def assemble(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: BlockFormat
) -> PackedWeight:
    """Pack what somebody else has rounded.

    Args:
        codes: uint8 ``[N, K]``, below 2^bits.
        scales: ``[N, B]`` with B = K / block_size rounded up, in values of ``fmt.scale_dtype``.
        zeros: ``[N, B]``, whole numbers; None for a symmetric format.
        fmt: the format.
    """
    import torch

    rows, columns = codes.shape
    middle = 1 << (fmt.bits - 1)
    padded = torch.nn.functional.pad(codes, (0, scales.shape[1] * fmt.block_size - columns), value=middle)
    return PackedWeight(
        _pack_bits(padded.view(rows, -1, fmt.block_size), fmt.bits).contiguous(),
        scales.to(getattr(torch, fmt.scale_dtype)).contiguous(),
        None if zeros is None else _pack_zero_points(zeros.to(torch.uint8), fmt.bits),
    )


def _pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _pack_zero_points(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    if bits == 4 and zeros.shape[1] % 2:
        zeros = torch.nn.functional.pad(zeros, (0, 1))
    return _pack_bits(zeros, bits).contiguous()


def unpack(packed: PackedWeight, fmt: BlockFormat, columns: int) -> torch.Tensor:
    """The float32 weight ``[N, columns]`` that a packed one stands for."""
    import torch

    def codes(data: torch.Tensor) -> torch.Tensor:
        if fmt.bits == 8:
            return data.to(torch.float32)
        return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).to(torch.float32)

    rows, blocks = packed.scales.shape
    zeros = (
        torch.full((rows, blocks), float(1 << (fmt.bits - 1)))
        if packed.zero_points is None
        else codes(packed.zero_points)[:, :blocks]
    )
    values = (codes(packed.data) - zeros.unsqueeze(-1)) * packed.scales.float().unsqueeze(-1)
    return values.reshape(rows, -1)[:, :columns]
