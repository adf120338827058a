"""The nodes of one graph, named after the checkpoint's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir


class Nodes:
    """Collects nodes in the order in which they are made, which is an order of execution."""

    def __init__(self) -> None:
        self.all: list[ir.Node] = []
        self._labels: Counter[str] = Counter()

    @contextmanager
    def apart(self) -> Iterator[list[ir.Node]]:
        """What is made meanwhile goes into a list of its own: the nodes of a graph within this one."""
        around, self.all = self.all, []
        try:
            yield self.all
        finally:
            self.all = around

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> ir.Value:
        """A node with one output of type ``dtype``; None leaves the type open.

        ``name`` is the tensor or module that the node belongs to; by default, that of its first input.
        """
        return self.ops(op_type, inputs, [dtype], attributes, domain=domain, name=name)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtypes: Sequence[ir.DataType | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> list[ir.Value]:
        """A node with one output for each of ``dtypes``."""
        outputs = [ir.Value(type=None if dtype is None else ir.TensorType(dtype)) for dtype in dtypes]
        node = self.add(op_type, inputs, outputs, attributes, domain=domain, name=name)
        for index, output in enumerate(outputs):
            output.name = f"{node.name}.output_{index}"
        return outputs

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> ir.Node:
        """A node that makes the given values."""
        label = self._label(op_type, name or _place_of(inputs[0]))
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=label)
        self.all.append(node)
        return node

    def _label(self, op_type: str, name: str) -> str:
        # "model.layers.0.mlp.up_proj.weight" becomes "/model/layers.0/mlp/up_proj", so that a profile
        # or an error of the runtime names the layer as the checkpoint does.
        stem = (
            name.removesuffix(".weight").removesuffix(".bias").replace(".", "/").replace("layers/", "layers.")
        )
        label = f"/{stem}/{op_type}" if stem else f"/{op_type}"
        self._labels[label] += 1
        return label if self._labels[label] == 1 else f"{label}_{self._labels[label]}"


def _place_of(value: ir.Value | None) -> str:
    name = "" if value is None else str(value.name)
    return name.strip("/").rpartition("/")[0]
