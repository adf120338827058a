"""The verification can fail: each mistake that an export could make is caught, in every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconvert.proof.report import Report
from qconvert.proof.report_view import write_report
from qrun.backends.kvcache import KVCache
from qrun.backends.ort.cache import InPlaceKVCache
from tests.qconvert.mutants import (
    Exporter,
    edit_graph,
    overwrite,
    spec_with,
    stored_at,
    swap_key_heads,
    wrong_rope_base,
)
from tests.tiny import make_tiny_checkpoint

PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "plain": make_tiny_checkpoint(root / "plain"),
        "sliding": make_tiny_checkpoint(root / "sliding", sliding=True),
    }


@pytest.fixture
def exporter(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(checkpoints["plain"], tmp_path, monkeypatch)


def wrong_tensors(report: Report) -> set[str]:
    return {fault.tensor for fault in report.weights.faults}


def wrong_paths(report: Report) -> dict[str, str]:
    """Failures in logits: "case, path" to what."""
    return {failure.where: failure.what for failure in report.failed if ", " in failure.where}


@PRECISIONS
def test_the_wrong_rope_base(exporter: Exporter, precision: str) -> None:
    report = exporter.verify(exporter.export_with(precision, "rope_tables", wrong_rope_base))
    assert not report.passed
    assert wrong_tensors(report) == {"cos_cache", "sin_cache"}
    assert "not before (look at attention" in wrong_paths(report)["long, whole"]


@PRECISIONS
def test_swapped_key_heads_in_the_graph(exporter: Exporter, precision: str) -> None:
    folder = exporter.export(precision)
    edit_graph(folder, swap_key_heads)
    report = exporter.verify(folder)
    assert not report.passed
    assert not report.weights.faults  # the weights are right: only running the graph can show it
    assert {"short, whole", "long, whole", "chinese, token by token, growing cache"} <= set(
        wrong_paths(report)
    )


@PRECISIONS
def test_swapped_key_value_heads_in_the_weights(exporter: Exporter, precision: str) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("k", "v"):
            for kind in ("weight", "bias"):
                tensor = tensors[f"model.layers.1.self_attn.{part}_proj.{kind}"]
                tensor.copy_(tensor.roll(16, dims=0))

    report = exporter.verify(exporter.export_of_changed_weights(precision, swap))
    assert not report.passed
    assert wrong_tensors(report) == {
        f"model.layers.1.self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")
    }


@PRECISIONS
def test_a_cache_that_is_one_short_from_the_second_call_on(
    exporter: Exporter, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def advance(self: KVCache, new_tokens: int) -> None:
        self.lengths += new_tokens - (1 if self.length else 0)

    folder = exporter.export(precision)
    monkeypatch.setattr(InPlaceKVCache, "advance", advance)
    report = exporter.verify(folder)
    assert not report.passed
    wrong = wrong_paths(report)
    assert {"long, in chunks", "long, token by token"} <= set(wrong)
    assert not {"long, whole", "chinese, token by token, growing cache"} & set(wrong)
    assert "the same prompt at once is right: look at the KV cache" in wrong["long, in chunks"]
    assert "greedy answer" in {failure.where for failure in report.failed}


@PRECISIONS
def test_a_cache_that_does_not_forget(
    exporter: Exporter, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exporter.export(precision)

    def trim(self: KVCache, length: int) -> None:
        KVCache.trim(self, min(length + 1, self.length))

    monkeypatch.setattr(InPlaceKVCache, "trim", trim)
    report = exporter.verify(folder)
    assert set(wrong_paths(report)) == {"chinese, cut back and continued"}


@PRECISIONS
def test_one_corrupted_block(exporter: Exporter, precision: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    options = {} if precision == "fp32" else {"block_size": 32, "recipe": "rtn"}
    folder = exporter.export(precision, **options)
    # Row 5, columns 32 to 63 of [64, 128].
    if precision == "fp32":
        overwrite(folder, name, (5 * 128 + 32) * 4, np.full(32, 0.25, np.float32).tobytes())
    else:
        bits = int(precision.removeprefix("int"))
        overwrite(folder, f"{name}.q{bits}", (5 * 128 + 32) * bits // 8, b"\x5a" * (32 * bits // 8))
    report = exporter.verify(folder)
    assert wrong_tensors(report) == {name}
    assert "row 5" in report.failures()
    assert precision == "fp32" or "columns from 32" in report.failures()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_one_wrong_scale(exporter: Exporter, precision: str) -> None:
    name = "model.layers.0.self_attn.q_k_v_proj.weight"  # q has 64 rows, k 32: row 70 is k's sixth
    folder = exporter.export(precision, block_size=32, recipe="rtn")
    path, offset, _ = stored_at(folder, f"{name}.scales")
    scale = np.fromfile(path, np.float32, 1, offset=offset + (70 * 2 + 1) * 4)
    overwrite(folder, f"{name}.scales", (70 * 2 + 1) * 4, (scale * 1.1).tobytes())
    report = exporter.verify(folder)
    assert wrong_tensors(report) == {"model.layers.0.self_attn.k_proj.weight"}
    assert "row 6, columns from 32" in report.failures()


@PRECISIONS
def test_a_transposed_weight(exporter: Exporter, precision: str) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"  # square: nothing notices by its shape

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].copy_(tensors[name].T.clone())

    report = exporter.verify(exporter.export_of_changed_weights(precision, transpose))
    assert not report.passed
    assert wrong_tensors(report) == {name}


@PRECISIONS
def test_a_window_that_is_one_token_short(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    exporter = Exporter(checkpoints["sliding"], tmp_path, monkeypatch)

    def shorten(windows: Any) -> Any:
        return tuple(window and window - 1 for window in windows)

    report = exporter.verify(exporter.export_with(precision, "spec_of", spec_with(sliding_windows=shorten)))
    assert not report.passed
    assert not report.weights.faults
    assert "long, whole" in wrong_paths(report)


@PRECISIONS
def test_the_wrong_epsilon_of_the_norms(exporter: Exporter, precision: str) -> None:
    report = exporter.verify(
        exporter.export_with(precision, "spec_of", spec_with(rms_norm_eps=lambda epsilon: 0.3))
    )
    assert not report.passed
    assert not report.weights.faults
    assert "long, whole" in wrong_paths(report)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_logits_that_are_not_numbers(exporter: Exporter, precision: str) -> None:
    name = "model.norm.weight"
    if precision.startswith("int"):
        name = "model.embed_tokens.weight"  # tied: token 0 gets no logit
    folder = exporter.export(precision)
    stored = np.array([np.nan], np.float16 if precision == "fp16" else np.float32).tobytes()
    overwrite(folder, f"{name}.scales" if precision.startswith("int") else name, 0, stored)
    report = exporter.verify(folder)
    assert wrong_tensors(report) == {name}
    assert wrong_paths(report)["long, whole"] == "NaN or Inf in the logits of position 0"
    (greedy,) = (failure for failure in report.failed if failure.where == "greedy answer")
    assert "no token can be chosen" in greedy.what
    write_report(report, folder)  # NaN must not break the report
