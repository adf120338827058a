"""int8's head multiplies what rounding its input leaves: if these fail, a sixth of its error is back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qrun.backends.opening import open_session
from qrun.folder.manifest import read_manifest
from tests.qconvert.mutants import Exporter, edit_graph
from tests.tiny import make_tiny_checkpoint

TOKENS = np.arange(3, 43, dtype=np.int64)[None]


@pytest.fixture
def exporter(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(tied, tmp_path, monkeypatch)


def head_nodes(graph: ir.Graph, kind: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == kind and (node.name or "").startswith("/lm_head")]


def logits(folder: Path) -> np.ndarray:
    session = open_session(folder, threads=1)
    return session.forward(TOKENS, session.new_cache(), "all")[0].copy()


def without_rest(graph: ir.Graph) -> None:
    """The second summand is zero."""
    (left,) = head_nodes(graph, "Sub")
    left.replace_input_with(0, left.inputs[1])


def in_float32(graph: ir.Graph) -> None:
    for node in head_nodes(graph, "MatMulNBits"):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)


def test_nothing_of_the_input_is_lost(exporter: Exporter) -> None:
    """What is left of the rounding of 8 bits is rounded to 8 bits itself: 16 of them."""
    folder = exporter.export("int8")
    assert read_manifest(folder).raw["recipe"]["head_residual"] is True  # type: ignore[index]
    ours = logits(folder)
    edit_graph(folder, in_float32)
    exact = logits(folder)
    edit_graph(folder, without_rest)
    rounded = exporter.export("int8", force=True)
    edit_graph(rounded, without_rest)
    lost = np.abs(logits(rounded) - exact).max()
    assert np.abs(ours - exact).max() < 0.03 * lost


def test_every_way_of_asking_gives_the_same_logits(exporter: Exporter) -> None:
    session = open_session(exporter.export("int8"), threads=1)
    whole = session.forward(TOKENS, session.new_cache(), "all")[0].copy()
    cache = session.new_cache()
    assert session.forward(TOKENS[:, :-1], cache, "none").shape == (1, 0, 320)
    np.testing.assert_allclose(session.forward(TOKENS[:, -1:], cache)[0, 0], whole[-1], atol=0.05)
    rows = session.forward(np.repeat(TOKENS, 3, 0), session.new_cache(batch=3))
    np.testing.assert_allclose(rows[:, 0], np.stack([whole[-1]] * 3), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_missing_rest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """A limit of KL divergence cannot tell it from rounding; the sharp twin can."""
    checkpoint = make_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied)
    exporter = Exporter(checkpoint, tmp_path, monkeypatch)
    folder = exporter.export("int8")
    assert exporter.verify(folder).passed
    edit_graph(folder, without_rest)
    assert not exporter.verify(folder).passed


def test_other_blocks_than_the_matrix_has_are_found(exporter: Exporter) -> None:
    def halve(graph: ir.Graph) -> None:
        shape = graph.initializers["head_blocks_shape"]
        assert shape.const_value is not None
        blocks, size = shape.const_value.numpy()[2:]
        wrong = np.array([0, 0, 2 * blocks, size // 2], dtype=np.int64)
        shape.const_value = ir.tensor(wrong, name="head_blocks_shape")

    folder = exporter.export("int8")
    edit_graph(folder, halve)
    report = exporter.verify(folder)
    assert "head_blocks_shape: the constant is" in report.failures()
