"""If these fail, a second graph that is broken, late or unfit for the processor is opened or missed."""

from __future__ import annotations

import json
import shutil
from threading import Event, Timer

import pytest
from click.testing import CliRunner

from qrun.backends.opening import open_session
from qrun.backends.ort import processor
from qrun.backends.ort.session import OrtSession
from qrun.cli.main import main
from qrun.errors import QrunError
from qrun.folder.manifest import read_manifest
from tests.qrun.prefilling import TOKENS, close, keys_and_values


@pytest.fixture(scope="module")
def folder(exporter):
    return exporter("int8", prefill=True, block_size=64, max_position_embeddings=1024)


def test_the_manifest_names_it(folder):
    manifest = read_manifest(folder)
    assert manifest.prefill is not None
    assert manifest.prefill_path == folder / "prefill.onnx"
    assert {"prefill.onnx", "prefill.onnx.data"} <= {entry.path for entry in manifest.files}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"file": "../prefill.onnx", "min_tokens": 24}, "outside the model folder"),
        ({"file": "prefill.onnx"}, '"graph.prefill.min_tokens" is missing'),
        ({"file": "prefill.onnx", "min_tokens": 0}, "not a positive number"),
        ("prefill.onnx", '"graph.prefill.file" is missing'),
    ],
    ids=str,
)
def test_a_bad_entry_in_the_manifest_is_refused(folder, tmp_path, value, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    facts = json.loads((broken / "qconvert.json").read_text())
    facts["graph"]["prefill"] = value
    (broken / "qconvert.json").write_text(json.dumps(facts))
    with pytest.raises(QrunError, match=message):
        open_session(broken)


def test_a_second_graph_that_reads_elsewhere_is_refused(folder, tmp_path):
    """Its weights are held against the manifest as the first graph's are."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    graph = (broken / "prefill.onnx").read_bytes()
    (broken / "prefill.onnx").write_bytes(graph.replace(b"prefill.onnx.data", b"/etc/some/passwds"))
    with pytest.raises(QrunError, match="not one of the model folder's files"):
        open_session(broken)


def cpu_with(flags: str, tmp_path, monkeypatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nmodel name : some\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "_CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_a_processor_whose_products_overflow_is_refused(folder, tmp_path, monkeypatch):
    """Without VNNI two products of 8 bits are added up in 16, and quietly cut off."""
    cpu_with("fpu avx2 avx512f", tmp_path, monkeypatch)
    result = CliRunner().invoke(main, ["generate", "--engine", str(folder), "--prompt", "a"])
    assert result.exit_code == 1
    assert "no VNNI" in result.output
    assert "--no-prefill-graph" in result.output
    arguments = [
        "generate",
        "--engine",
        str(folder),
        "--prompt",
        "a",
        "--max-tokens",
        "2",
        "--no-prefill-graph",
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0


@pytest.mark.parametrize("flags", ["fpu avx2 avx_vnni", "fpu avx512f avx512_vnni"])
def test_a_processor_with_vnni_is_welcome(folder, tmp_path, monkeypatch, flags):
    cpu_with(flags, tmp_path, monkeypatch)
    assert open_session(folder)._prefill is not None


@pytest.mark.parametrize("graph", ["model.onnx", "prefill.onnx"])
def test_either_graph_that_does_not_open_is_named(folder, tmp_path, graph) -> None:
    """Both are opened side by side, by two threads."""
    import onnx

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    model = onnx.load(broken / graph, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    (broken / graph).write_bytes(model.SerializeToString())
    manifest = json.loads((broken / "qconvert.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == graph:
            entry["size"] = (broken / graph).stat().st_size
    (broken / "qconvert.json").write_text(json.dumps(manifest))
    with pytest.raises(QrunError, match="cannot open the graph") as caught:
        open_session(broken)
    assert str(caught.value.where).endswith(graph)


@pytest.fixture
def held(monkeypatch):
    """Until it is set, no second graph is opened."""
    release, really = Event(), OrtSession._open

    def open_when_released(self, device, graph):
        if graph.name == "prefill.onnx":
            assert release.wait(60)
        return really(self, device, graph)

    monkeypatch.setattr(OrtSession, "_open", open_when_released)
    yield release
    release.set()


def test_opened_later_it_makes_only_the_prompts_wait_that_need_it(folder, held):
    alone = open_session(folder, threads=2, prefill_graph=False)
    by_the_first = alone.new_cache()
    alone.forward(TOKENS, by_the_first)
    session = open_session(folder, prefill_graph="later")
    short = session.new_cache()
    session.forward(TOKENS[:, :8], short)  # too short for the second graph
    assert short.length == 8
    Timer(0.3, held.set).start()
    cache = session.new_cache()
    session.forward(TOKENS, cache, "none")
    assert held.is_set()
    assert close(keys_and_values(cache), keys_and_values(by_the_first))


def test_opened_later_its_errors_come_with_the_first_prompt_that_needs_it(folder, monkeypatch):
    really = OrtSession._open

    def fails(self, device, graph):
        if graph.name == "prefill.onnx":
            raise QrunError("cannot open the graph", where=graph)
        return really(self, device, graph)

    monkeypatch.setattr(OrtSession, "_open", fails)
    session = open_session(folder, prefill_graph="later")
    cache = session.new_cache()
    for _ in range(2):
        with pytest.raises(QrunError, match="cannot open the graph"):
            session.forward(TOKENS, cache, "none")
        assert cache.length == 0
    session.forward(TOKENS[:, :8], cache)
    with pytest.raises(QrunError, match="cannot open the graph"):
        open_session(folder)


def test_the_chat_does_not_wait_for_it(folder, monkeypatch):
    asked = []

    def record(*args, **options):
        asked.append(options["prefill_graph"])
        return open_session(*args, **options)

    monkeypatch.setattr("qrun.model.open_session", record)
    runner = CliRunner()
    for arguments in (
        ["chat"],
        ["chat", "--no-prefill-graph"],
        ["generate", "--prompt", "a", "--max-tokens", "1"],
    ):
        assert runner.invoke(main, [*arguments, "--engine", str(folder)], input="").exit_code == 0
    assert asked == ["later", False, True]
