"""If these fail, a head multiplied in parts gives other logits than a whole one, or costs more bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconvert.export import ExportOptions, export
from qconvert.lowering.ort import decoder as lowering
from qconvert.progress import Progress
from qrun.backends.opening import open_session
from tests.tiny import make_tiny_checkpoint

TOKENS = np.arange(3, 43, dtype=np.int64)[None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_parts_are_the_whole(tmp_path: Path, monkeypatch, precision: str, tied: bool) -> None:
    source = make_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied)
    found, sizes = [], []
    for part in (1 << 25, 320 * 64 // 3):  # the tiny head whole, and then in four parts
        monkeypatch.setattr(lowering, "_HEAD_PART", part)
        options = ExportOptions(precision, output=tmp_path / f"m{part}", verify=part != 1 << 25)
        folder = export(str(source), options, Progress(quiet=True)).folder
        session = open_session(folder, threads=1)
        products = [n for n in _nodes(folder) if "lm_head" in n.name and n.op_type == "MatMulNBits"]
        assert len(products) == (1 if part == 1 << 25 else 4)
        found.append(session.forward(TOKENS, session.new_cache(), "all").copy())
        sizes.append((folder / "model.onnx.data").stat().st_size)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert sizes[0] == sizes[1]


def _nodes(folder: Path):
    import onnx

    return onnx.load(folder / "model.onnx", load_external_data=False).graph.node
