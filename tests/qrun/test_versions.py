"""If these fail, an ONNX Runtime that is too old for a model is told without the remedy."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

import qrun
from qrun.backends.opening import open_session
from qrun.backends.ort import wheels
from qrun.backends.ort.wheels import check_onnxruntime_version
from qrun.errors import QrunError
from tests.commands import qrun as command
from tests.commands import refused
from tests.fakes import fake_manifest

# The kind of model, and the first version that runs it.
NEEDS = {
    "float32 onnxruntime": "1.23",
    "int8 onnxruntime": "1.27",
    "float16 tensorrt": "1.25",
}


@pytest.mark.parametrize("kind", NEEDS)
@pytest.mark.parametrize("version", ["1.22.1", "1.23.0", "1.24.4", "1.26.0", "1.27.0", "1.32.0.dev1", "2.0"])
def test_a_version_that_is_too_old_is_told_with_the_one_that_will_do(kind, version):
    dtype, target = kind.split()
    manifest = fake_manifest(context_length=64)
    manifest = replace(manifest, target=target, kv=replace(manifest.kv, dtype=dtype))
    needed = NEEDS[kind]
    if wheels.numbers(version) >= wheels.numbers(needed):
        check_onnxruntime_version(manifest, version)
        return
    with pytest.raises(QrunError, match=f"needs ONNX Runtime {needed} or later, and {version} is") as caught:
        check_onnxruntime_version(manifest, version)
    assert "pip install -U onnxruntime" in str(caught.value.hint)
    # On Python 3.10 that command brings 1.23 for ever.
    newer = sys.version_info < (3, 11) and needed != "1.23"
    assert ("with Python 3.11 or later" in str(caught.value.hint)) == newer


def test_the_gpu_wheel_is_updated_by_its_own_name(monkeypatch):
    versions = {"onnxruntime-gpu": "1.20.0"}
    monkeypatch.setattr(wheels, "_version_of", versions.get)
    monkeypatch.setattr(wheels, "_installed", versions.__contains__)
    with pytest.raises(QrunError, match=r"1\.20\.0 is installed") as caught:
        check_onnxruntime_version(fake_manifest(context_length=64))
    assert caught.value.hint == "pip install -U onnxruntime-gpu"


def test_a_folder_with_a_cache_of_8_bits_is_refused_before_it_is_opened(exporter, monkeypatch):
    folder = exporter("int8", int8_kv_cache=True, runs_here=False, max_position_embeddings=1024)
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("it is opened"))
    message = refused(command("generate", "--engine", folder, "--prompt", "hi"))
    assert "a KV cache of 8 bits needs ONNX Runtime 1.27 or later, and 1.26.0 is installed" in message
    assert "memory" not in message
    monkeypatch.setattr(wheels, "_version_of", {"onnxruntime": "1.26.0"}.get)
    told = " ".join(command("info", folder).stdout.split())
    assert "cannot run" in told
    assert "needs ONNX Runtime 1.27 or later" in told


@pytest.mark.parametrize(
    ("said", "does"),
    [
        ("BFCArena::AllocateRawInternal: Failed to allocate memory for requested buffer", "free some memory"),
        ("std::bad_alloc", "free some memory"),
        ("Non-zero status code: Tensor type mismatch", "update ONNX Runtime (pip install -U onnxruntime)"),
    ],
)
def test_what_fails_while_it_runs_has_the_remedy_of_its_cause(said, does, tiny_export, monkeypatch):
    model = qrun.open(tiny_export)

    def run(_binding: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(model.session, "_inference", Failing(model.session._inference, run))
    with pytest.raises(QrunError, match="cannot run the graph") as caught:
        list(model.generate("hello", max_tokens=2))
    assert str(caught.value.hint).startswith(does)


class Failing:
    """A session of ONNX Runtime that runs otherwise."""

    def __init__(self, inner, run) -> None:
        self._inner, self.run_with_iobinding = inner, run

    def __getattr__(self, name):
        return getattr(self._inner, name)


@pytest.mark.skipif(
    wheels.numbers(onnxruntime.__version__) < (1, 32), reason="this one could not answer both ways"
)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_older_libraries_are_never_asked_for_a_layer_without_rows(exporter, monkeypatch, precision):
    """They failed, or ended the process with SIGFPE, on prompts in several pieces."""
    folder = exporter(precision)
    ids = np.random.default_rng(0).integers(0, 100, (1, 12))
    found = []
    for version in ("1.32.0", "1.31.0"):
        monkeypatch.setattr("onnxruntime.__version__", version)
        session, asked = open_session(folder), []
        cache = session.new_cache()
        real = cache.bind
        monkeypatch.setattr(
            cache,
            "bind",
            lambda new, logits, asked=asked, real=real: asked.append(logits) or real(new, logits),
        )
        assert session.forward(ids[:, :8], cache, "none").shape == (1, 0, session.manifest.model.vocab_size)
        found.append(session.forward(ids[:, 8:], cache, "last").copy())
        assert asked == ["none" if version == "1.32.0" else "last", "last"]
    assert np.array_equal(*found)
