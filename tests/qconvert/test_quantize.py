"""Packing one tensor: what comes back is within half a step, and ONNX Runtime reads it as we do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qconvert.errors import QconvertError
from qconvert.formats.blocks import pack, unpack
from qconvert.formats.layout import PIECE, NonFiniteWeightError, is_finite, nibbles, row_ranges
from qconvert.formats.recipe import BlockFormat
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.choose import Wishes, choose
from qconvert.recipes.precisions import recipe_for
from qconvert.targets import target_named

FORMATS = [
    BlockFormat(bits, size, symmetric)
    for bits in (4, 8)
    for size in (16, 32, 128)
    for symmetric in (True, False)
]


def weight(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=generator) * torch.rand((rows, 1), generator=generator)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_value_comes_back_within_half_a_step(fmt: BlockFormat) -> None:
    original = weight()
    packed = pack(original, fmt)
    error = (unpack(packed, fmt, 256) - original).abs().view(24, -1, fmt.block_size)
    # Rounding the zero point of an asymmetric block costs up to half a step more.
    steps = 0.501 if fmt.symmetric else 1.001
    assert bool((error <= steps * packed.scales.unsqueeze(-1)).all())


def test_asymmetric_blocks_are_closer_than_symmetric_ones() -> None:
    original = weight() + 0.5
    errors = [
        (unpack(pack(original, fmt), fmt, 256) - original).square().mean().item()
        for fmt in (BlockFormat(4, 32, True), BlockFormat(4, 32, False))
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_block_of_zeros_and_a_constant_block_are_exact(fmt: BlockFormat) -> None:
    original = torch.zeros((2, fmt.block_size))
    original[1] = 3.0
    assert torch.allclose(unpack(pack(original, fmt), fmt, fmt.block_size), original, atol=1e-6)


def test_columns_that_do_not_fill_the_last_block_are_padded() -> None:
    fmt = BlockFormat(4, 128, symmetric=False)
    original = weight(columns=200)
    packed = pack(original, fmt)
    assert packed.data.shape == (24, 2, 64)
    assert packed.zero_points is not None
    assert packed.zero_points.shape == (24, 1)
    assert (unpack(packed, fmt, 200) - original).abs().max() < packed.scales.max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_one_bad_value_is_noticed(fmt: BlockFormat, bad: float) -> None:
    original = weight()
    original[7, 33] = bad
    with pytest.raises(NonFiniteWeightError):
        pack(original, fmt)


def test_pieces_and_threads_do_not_change_the_result() -> None:
    fmt = BlockFormat(4, 32, symmetric=False)
    original = weight(rows=2 * PIECE // 256 + 5)
    assert len(list(row_ranges(original))) == 3
    with ThreadPoolExecutor(4) as pool:
        threaded = pack(original, fmt, pool)
    parts = [pack(original[part], fmt) for part in row_ranges(original)]
    assert torch.equal(threaded.data, torch.cat([part.data for part in parts]))
    assert torch.equal(threaded.scales, torch.cat([part.scales for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    values = torch.full((7, 37), torch.finfo(dtype).max, dtype=dtype)
    values[::2] *= -1
    assert is_finite(values)
    for place in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[place] = bad
        assert not is_finite(changed)
        assert not is_finite(changed.t())


def test_a_tensor_without_values_is_finite() -> None:
    assert is_finite(torch.empty(0, 3))


@pytest.mark.parametrize("turned", [False, True])
def test_each_byte_holds_two_numbers_the_earlier_one_in_its_low_bits(turned: bool) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(64, 4)
    packed = packed.t() if turned else packed
    expected = [[half for byte in row for half in (byte % 16, byte // 16)] for row in packed.tolist()]
    assert nibbles(packed).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_packed_from_their_float32_values(dtype: torch.dtype) -> None:
    fmt = BlockFormat(8, 32, symmetric=True)
    half = weight().to(dtype)
    assert torch.equal(pack(half, fmt).data, pack(half.float(), fmt).data)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_onnxruntime_multiplies_by_the_same_weight(fmt: BlockFormat) -> None:
    original = weight()
    packed = pack(original, fmt)
    hidden = np.random.default_rng(0).standard_normal((3, 256), dtype=np.float32)
    product = matmul_nbits(hidden, packed.data, packed.scales, packed.zero_points, fmt)
    expected = hidden @ unpack(packed, fmt, 256).numpy().T
    assert np.abs(product - expected).max() < 1e-4


def matmul_nbits(hidden, data, scales, zeros, fmt: BlockFormat) -> np.ndarray:
    x = ir.Value(name="x", shape=ir.Shape(hidden.shape), type=ir.TensorType(ir.DataType.FLOAT))
    initializers = []
    for name, tensor in (("data", data), ("scales", scales), ("zeros", zeros)):
        if tensor is not None:
            constant = ir.tensor(tensor.numpy(), name=name)
            initializers.append(ir.Value(name=name, const_value=constant))
    attributes = {"K": hidden.shape[1], "N": data.shape[0], "bits": fmt.bits, "block_size": fmt.block_size}
    node = ir.node("MatMulNBits", [x, *initializers], attributes, domain="com.microsoft")
    output = node.outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [output],
        nodes=[node],
        initializers=initializers,
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": hidden})[0]


def test_the_embedding_takes_the_largest_block_that_divides_its_rows() -> None:
    recipe = recipe_for("int4", hidden_size=576, block_size=128)
    assert recipe.linear == BlockFormat(4, 128, symmetric=False)
    assert recipe.head == BlockFormat(8, 64, symmetric=True)


@pytest.mark.parametrize(
    ("sizes", "linear", "exceptions"),
    [
        ((896, 14, 4864), 128, {"down_proj": 256}),  # Qwen2.5 0.5B
        ((1536, 12, 8960), 256, {}),  # 1.5B
        ((576, 9, 1536), 64, {"down_proj": 256}),
    ],
    ids=str,
)
def test_int4_takes_the_longest_blocks_that_divide_each_matrix(
    sizes: tuple[int, int, int], linear: int, exceptions: dict[str, int]
) -> None:
    hidden, heads, intermediate = sizes
    spec = DecoderSpec(
        2, heads, 2, hidden // heads, hidden, intermediate, 9999, 1e-6, True, 256, (None, None)
    )
    target = target_named("onnxruntime").capabilities
    recipe = choose(Wishes("int4", recipe="rtn"), target, spec).recipe
    assert isinstance(recipe.linear, BlockFormat)
    assert recipe.linear.block_size == linear
    calibrated = choose(Wishes("int4"), target, spec).recipe
    assert getattr(calibrated.linear, "block_size", 0) == linear
    assert {part: fmt.block_size for part, fmt in calibrated.exceptions.items()} == {"down_proj": 128}
    assert {part: fmt.block_size for part, fmt in recipe.exceptions.items()} == exceptions
    asked = choose(Wishes("int4", 32, recipe="rtn"), target, spec).recipe
    assert (asked.linear, asked.exceptions) == (BlockFormat(4, 32, symmetric=False), {})


def test_bad_options_name_themselves() -> None:
    with pytest.raises(QconvertError, match=r"unknown precision 'int3'(.|\n)*fp32, fp16, int8, int4"):
        recipe_for("int3", 64)
    with pytest.raises(QconvertError, match="unknown block size 48"):
        recipe_for("int4", 64, 48)
    with pytest.raises(QconvertError, match="hidden_size 24 is no multiple of 16"):
        recipe_for("int8", 24)
