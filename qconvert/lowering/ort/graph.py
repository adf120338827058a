"""One graph for ONNX Runtime while it is built: its operators, and the products that all lowerings share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.lowering.initializers import Initializers, PackedValues
from qconvert.lowering.nodes import Nodes

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
IR_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


class OrtGraph:
    """Collects the nodes of one graph.

    Args:
        recipe: for the activations' type and the accuracy of products.
        initializers: of this graph.

    Attributes:
        initializers: as given.
        nodes: in order of execution.
        dtype: of the activations, for the graph.
        torch_dtype: the same for PyTorch.
    """

    def __init__(self, recipe: Recipe, initializers: Initializers) -> None:
        self.initializers = initializers
        self.nodes = Nodes()
        self.dtype = IR_TYPES[recipe.activations]
        self.torch_dtype = {"float32": torch.float32, "float16": torch.float16}[recipe.activations]
        self._accuracy_level = recipe.accuracy_level
        self._cast_scales: dict[ir.Value, ir.Value] = {}
        self._block_sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> ir.Value:
        """A node with one output; see ``Nodes.op`` for its ``name``."""
        return self.ops(op_type, inputs, attributes, 1, domain=domain, name=name)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None,
        num_outputs: int,
        *,
        domain: str = "",
        name: str = "",
    ) -> Sequence[ir.Value]:
        """A node with several outputs."""
        return self.nodes.ops(op_type, inputs, [None] * num_outputs, attributes, domain=domain, name=name)

    def constant(self, name: str, value: int | list[int]) -> ir.Value:
        """A small int64 tensor."""
        return self.initializers.constant(name, np.array(value, dtype=np.int64))

    def multiply_dense(self, hidden: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        """``hidden`` times a weight ``[out, in]``."""
        # Weights stay [out, in] as in the checkpoint, so that a tied embedding serves as the head too.
        return self.op("FusedMatMul", [hidden, weight], {"transB": 1}, domain=CONTRIB, name=name)

    def multiply_packed(
        self, hidden: ir.Value, weight: PackedValues, fmt: BlockFormat, bias: ir.Value | None, name: str
    ) -> ir.Value:
        """``hidden`` times a weight ``[out, in]`` in blocks, plus a bias where there is one.

        What is added to all weights of a block is multiplied with the sum of the block's features.
        """
        attributes = {
            "K": weight.columns,
            "N": weight.rows,
            "bits": fmt.bits,
            "block_size": fmt.block_size,
            "accuracy_level": self._accuracy_level,
        }
        inputs = [hidden, weight["data"], self.scales(weight, name), weight.get("zero_points"), None, bias]
        while inputs[-1] is None:
            inputs.pop()
        product = self.op("MatMulNBits", inputs, attributes, domain=CONTRIB, name=name)
        residuals = weight.get("residuals")
        if residuals is None:
            return product
        sums = self._sums_of_blocks(hidden, weight.columns, fmt.block_size, name)
        return self.op("Add", [product, self.multiply_dense(sums, residuals, name)], name=name)

    def _sums_of_blocks(self, hidden: ir.Value, columns: int, size: int, name: str) -> ir.Value:
        """Features ``[batch, seq, columns]`` added up block by block; products of the same ones share it."""
        if (hidden, size) not in self._block_sums:
            blocks = columns // size
            # No length may be inferred (-1): where no position's logits are wanted, the tensor is empty.
            shape = self.constant(f"{blocks}_blocks_of_{size}", [0, 0, blocks, size])
            split = self.op("Reshape", [hidden, shape], name=name)
            axis = self.constant("features_axis", [-1])
            self._block_sums[hidden, size] = self.op("ReduceSum", [split, axis], {"keepdims": 0}, name=name)
        return self._block_sums[hidden, size]

    def scales(self, weight: PackedValues, name: str) -> ir.Value:
        """Scales in the activations' type: ONNX Runtime folds the cast away when it loads the model."""
        scales = weight["scales"]
        if scales.dtype == self.dtype:
            return scales
        if scales not in self._cast_scales:  # embedding and head share those of a tied matrix
            self._cast_scales[scales] = self.op("Cast", [scales], {"to": self.dtype}, name=name)
        return self._cast_scales[scales]


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    """A named value of the graph, such as an input."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
