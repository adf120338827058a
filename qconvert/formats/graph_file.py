"""Opens a finished graph whose data files may be links."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


def load_graph(path: Path) -> ir.Model:
    """The graph of a model folder whose names have been held against the manifest.

    onnx_ir refuses data files that are links to another folder, or have a second hard link, as a hub's cache
    or a backup has them. So each tensor is given the true place of its data.
    """
    model = ir.load(path)
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    (path.parent / tensor.location).resolve(),
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name or "",
                )
    return model
