"""If these fail, ``--device tensorrt`` runs elsewhere in silence, or tells the provider something wrong.

No machine of ours has a GPU: the session runs here with the CPU's provider in the place of TensorRT's.
"""

from __future__ import annotations

import io
import json
import shutil
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qconvert.tensorrt.backends import choose_backend
from qconvert.tensorrt.build import BuilderSettings, build_plan
from qrun.backends.opening import open_session
from qrun.backends.ort import provider as ort_tensorrt
from qrun.backends.ort import session as ort
from qrun.backends.ort.provider import (
    ProviderSession,
    ProviderValues,
    engine_cache_of,
    open_provider_session,
    provider_options,
)
from qrun.errors import QrunError
from qrun.folder.manifest import read_manifest
from qrun.folder.plan import Profile
from tests.commands import qrun, refused
from tests.qconvert.building import LENGTH, TinyExports, needs_rtx
from tests.qrun.test_cli_folders import install

TOKENS = np.random.default_rng(0).integers(0, 256, 50, dtype=np.int64)[None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyExports:
    return TinyExports(tmp_path_factory.mktemp("exports"))


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime's GPU wheel, and a place for its engines."""
    install(monkeypatch, "onnxruntime-gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def generate(folder: Path) -> Any:
    return qrun("generate", "--engine", folder, "--prompt", "hi", "--device", "tensorrt", "--max-tokens", 2)


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(QrunError) as caught:
        call(*arguments, **options)
    assert caught.value.hint, f"it does not say what to do: {caught.value}"
    return str(caught.value)


# What the provider is given


@needs_rtx
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int4"])
def test_the_providers_graph_passes_the_real_parser_and_builder(
    exported: TinyExports, precision: str
) -> None:
    graph = exported(precision) / "model.provider.onnx"
    assert not any(node.domain for node in ir.load(graph).graph), (
        "an operator that ONNX Runtime does not know"
    )
    settings = BuilderSettings(profiles=(Profile("prompt", 1, 32, 64),))
    plan = io.BytesIO()
    built = build_plan(choose_backend("rtx", ("8.9",)), graph, settings, plan, lambda *_: None)
    assert built.size == len(plan.getvalue()) > 100_000


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_it_is_the_verified_graph_without_its_casts(exported: TinyExports, precision: str) -> None:
    """Node by node: what the CPU's graph has more are the casts around its arithmetic."""

    def operators(name: str) -> list[tuple[str, str]]:
        graph = ir.load(exported(precision) / name).graph
        return [(node.op_type, str(node.name)) for node in graph if node.op_type != "Cast"]

    assert operators("model.provider.onnx") == operators("model.standard.onnx")


def test_options_and_shapes_come_from_the_manifest(exported: TinyExports, tmp_path: Path) -> None:
    options = provider_options(read_manifest(exported("bf16")), tmp_path)
    assert (options["trt_bf16_enable"], "trt_fp16_enable" in options) == ("True", False)
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("True", str(tmp_path))
    shapes = {}
    for kind in ("min", "opt", "max"):
        pairs = (pair.split(":") for pair in options[f"trt_profile_{kind}_shapes"].split(","))
        shapes[kind] = dict(pairs)
    graph = ir.load(exported("bf16") / "model.provider.onnx").graph
    assert set(shapes["min"]) == set(shapes["opt"]) == set(shapes["max"]) == {v.name for v in graph.inputs}
    assert [shapes[kind]["input_ids"] for kind in shapes] == ["1x1", f"1x{LENGTH}", f"1x{LENGTH}"]
    assert {shapes[kind]["logits_positions"] for kind in shapes} == {"1"}
    assert {shapes[kind]["past_key_values.2.value"] for kind in shapes} == {f"1x2x{LENGTH}x16"}
    assert provider_options(read_manifest(exported("fp16")), tmp_path)["trt_fp16_enable"] == "True"


def test_engines_are_kept_apart_by_graph_and_weights(
    exported: TinyExports, tmp_path: Path, wheel: None
) -> None:
    first = engine_cache_of(read_manifest(exported("bf16")))
    assert first.is_relative_to(tmp_path / "cache" / "qrun")
    assert first != engine_cache_of(read_manifest(exported("fp16")))
    copy = shutil.copytree(exported("bf16"), tmp_path / "copy")
    assert first == engine_cache_of(read_manifest(copy)), "the same model elsewhere needs no second engine"


# What is refused


def test_without_the_provider_nothing_runs_on_the_cpu(exported: TinyExports, wheel: None) -> None:
    message = refused(generate(exported("bf16")))
    assert "TensorrtExecutionProvider is not available" in message
    assert "qconvert build FOLDER" in message


def test_the_cpu_wheel_is_told(exported: TinyExports, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "onnxruntime")
    message = refused(generate(exported("bf16")))
    assert "--device tensorrt needs ONNX Runtime's GPU wheel" in message


def test_folders_that_tensorrt_cannot_run(exported: TinyExports, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported("bf16"), tmp_path / "other"))
    manifest = json.loads((other / "qconvert.json").read_text())
    (other / "qconvert.json").write_text(json.dumps({**manifest, "target": "onnxruntime"}))
    assert "operators of ONNX Runtime, which TensorRT's parser refuses" in refused(generate(other))
    assert "no attention kernel in float32" in refused(generate(exported("fp32")))
    message = refused(qrun("generate", "--engine", exported("bf16"), "--prompt", "hi", "--device", "cuda"))
    assert "not on ONNX Runtime's CUDA kernels" in message


def test_a_node_that_lands_on_the_cpu_is_an_error_that_names_it(
    exported: TinyExports, wheel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = types.SimpleNamespace(name="/model/layers.1/self_attn/TensorScatter", op_type="TensorScatter")
    shape = types.SimpleNamespace(name="/model/mask/Unsqueeze", op_type="Unsqueeze")
    of_lengths = types.SimpleNamespace(name="/attend_by_groups/Range", op_type="Range")
    assigned = [
        types.SimpleNamespace(ep_name="TensorrtExecutionProvider", get_nodes=list),
        types.SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: [node, shape, of_lengths]),
    ]
    monkeypatch.setitem(ort._PROVIDERS, "tensorrt", "CPUExecutionProvider")
    monkeypatch.setattr(ProviderSession, "providers", lambda self, device: ["CPUExecutionProvider"])

    class Inference:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return assigned

    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: Inference())
    message = refused(generate(exported("bf16")))
    assert "1 nodes would run on the CPU, not on tensorrt: /model/layers.1/self_attn/TensorScatter" in message


def test_an_engine_cache_that_cannot_be_made_is_told(
    exported: TinyExports, wheel: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setitem(ort._PROVIDERS, "tensorrt", "CPUExecutionProvider")
    assert "set XDG_CACHE_HOME" in refused(generate(exported("bf16")))


# The session itself, with the CPU's provider


@pytest.fixture
def session(exported: TinyExports, wheel: None, monkeypatch: pytest.MonkeyPatch) -> ProviderSession:
    """fp16: of the half types the one in which ONNX Runtime's CPU provider has arithmetic."""
    monkeypatch.setitem(ort._PROVIDERS, "tensorrt", "CPUExecutionProvider")
    monkeypatch.setattr(ProviderSession, "providers", lambda self, device: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "nodes_on_cpu", lambda inference: [])
    monkeypatch.setattr(
        ProviderValues, "device_type", property(lambda self: "cpu", lambda self, _: None), raising=False
    )
    monkeypatch.setattr(ort_tensorrt, "MOST_TOKENS", 16)
    opened = open_session(exported("fp16"), device="tensorrt", threads=1)
    assert isinstance(opened, ProviderSession)
    return opened


def test_it_computes_what_the_verified_graph_computes(
    session: ProviderSession, exported: TinyExports
) -> None:
    """The prompt whole (in pieces of the profile), then token by token, with the cache on "the GPU"."""
    verified = open_session(exported("fp16"), threads=1)
    ours, theirs = session.new_cache(), verified.new_cache()
    for start, stop, wanted in ((0, 33, "none"), (33, 49, "last"), (49, 50, "last")):
        tokens = TOKENS[:, start:stop]
        found = session.forward(tokens, ours, wanted)
        expected = verified.forward(tokens, theirs, wanted)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=0.05)
    assert ours.length == 50


def test_what_it_cannot_do_is_refused(session: ProviderSession) -> None:
    cache = session.new_cache()
    assert "logits of one position" in refusal(session.forward, TOKENS, cache, "all")
    assert "one sequence at a time" in refusal(session.new_cache, 2)
    assert "it cannot grow" in refusal(session.new_cache, in_place=False)
    too_many = np.zeros((1, LENGTH + 1), dtype=np.int64)
    assert f"has a context of {LENGTH}" in refusal(session.forward, too_many, cache)
    assert cache.length == 0


def test_a_manifest_without_the_graph(exported: TinyExports) -> None:
    manifest = replace(read_manifest(exported("bf16")), other_graphs={})
    assert '"graph.provider_file" is None' in refusal(open_provider_session, manifest, threads=1)
