"""If these fail, a prompt's keys and values by the second graph are not those that the first one needs."""

from __future__ import annotations

import json
import shutil
from threading import Event, Timer

import numpy as np
import pytest
from click.testing import CliRunner

from qrun.backends.opening import open_session
from qrun.backends.ort import processor
from qrun.backends.ort.prefill import PrefillGraph
from qrun.backends.ort.session import OrtSession
from qrun.cli.main import main
from qrun.decoding.generate import Context, Prefilled, Token, generate
from qrun.errors import QrunError
from qrun.folder.manifest import read_manifest
from qrun.sampling.sampler import SamplingParams

TOKENS = np.random.default_rng(0).integers(0, 256, (1, 300), dtype=np.int64)
# Keys and values lie around 2. What 8 bits a weight and an activation cost them here is a tenth of what
# a token at a wrong position or an absent bias costs.
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def folder(exporter):
    return exporter("int8", prefill=True, block_size=64, max_position_embeddings=1024)


@pytest.fixture
def session(folder) -> OrtSession:
    opened = open_session(folder, threads=2)
    assert isinstance(opened, OrtSession)
    return opened


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Tokens that each run of the second graph was given."""
    counts: list[int] = []
    read = PrefillGraph.read

    def counted(self, token_ids, cache):
        counts.append(token_ids.shape[1])
        read(self, token_ids, cache)

    monkeypatch.setattr(PrefillGraph, "read", counted)
    return counts


def keys_and_values(cache) -> np.ndarray:
    return np.stack([buffer.numpy()[:, :, : cache.length] for buffer in cache._buffers])


def close(found: np.ndarray, due: np.ndarray) -> bool:
    """Whether keys and values agree as far as two ways of rounding to 8 bits let them."""
    return bool(np.sqrt(np.mean((found - due) ** 2)) < TOLERANCE * np.sqrt(np.mean(due**2)))


@pytest.fixture
def due(session) -> np.ndarray:
    """Keys and values by the first graph, which alone knows logits for all positions."""
    cache = session.new_cache()
    session.forward(TOKENS, cache, "all")
    return keys_and_values(cache)


@pytest.mark.parametrize("sizes", [[300], [100, 200], [40, 5, 255], [256, 44]], ids=str)
def test_both_graphs_leave_the_same_keys_and_values(session, due, reads, sizes):
    """Pieces of fewer than ``min_tokens`` go through the first graph, behind and before longer ones."""
    cache, start = session.new_cache(), 0
    for size in sizes:
        assert session.forward(TOKENS[:, start : start + size], cache, "none").shape == (1, 0, 320)
        start += size
        assert cache.length == start
    assert reads == [size for size in sizes if size >= 32]
    assert close(keys_and_values(cache), due)


@pytest.fixture
def of_8_bits(exporter) -> OrtSession:
    """A session whose prompts are read by the float kernel, and whose cache holds codes."""
    folder = exporter("int8", prefill=True, block_size=64, int8_kv_cache=True, max_position_embeddings=1024)
    opened = open_session(folder, threads=2)
    assert isinstance(opened, OrtSession)
    return opened


def codes_of(session, sizes, tokens=TOKENS, cache=None) -> np.ndarray:
    cache, start = session.new_cache(len(tokens)) if cache is None else cache, 0
    for size in sizes:
        session.forward(tokens[:, start : start + size], cache, "none")
        start += size
    return keys_and_values(cache).astype(np.float32)


@pytest.mark.parametrize("sizes", [[100, 200], [40, 5, 255], [256, 44]], ids=str)
def test_a_cache_of_8_bits_is_read_back_between_pieces(of_8_bits, reads, sizes):
    """New tokens see the rounded keys of their own piece, so that pieces and a whole give the same."""
    whole, pieces = codes_of(of_8_bits, [300]), codes_of(of_8_bits, sizes)
    assert reads == [300, *(size for size in sizes if size >= 32)]
    first = slice(sizes[0]) if min(sizes) >= 32 else slice(40)  # the graph that decodes rounds otherwise
    assert np.abs(pieces[:, :, :, first] - whole[:, :, :, first]).max() <= 1
    if min(sizes) >= 32:
        assert (pieces == whole).mean() > 0.98
    turned = np.concatenate([TOKENS[:, : sizes[0]][:, ::-1], TOKENS[:, sizes[0] :]], 1)
    other = codes_of(of_8_bits, sizes, turned)
    layers = slice(2, None)  # the first layer's keys and values do not depend on other tokens
    assert (other[layers, :, :, sizes[0] :] == whole[layers, :, :, sizes[0] :]).mean() < 0.5


def test_a_cache_of_8_bits_is_cut_back_and_grows(of_8_bits):
    cache = of_8_bits.new_cache()
    codes_of(of_8_bits, [300], TOKENS[:, ::-1], cache)
    cache.trim(0)
    codes_of(of_8_bits, [200], TOKENS, cache)
    of_8_bits.forward(TOKENS[:, :40], cache, "none")
    cache.trim(200)
    of_8_bits.forward(TOKENS[:, 200:], cache, "none")
    assert (keys_and_values(cache) == codes_of(of_8_bits, [300])).mean() > 0.98


def test_two_sequences_at_once_in_8_bits(of_8_bits):
    both = codes_of(of_8_bits, [300], np.concatenate([TOKENS, TOKENS[:, ::-1]]))
    for row, tokens in enumerate((TOKENS, TOKENS[:, ::-1])):
        assert (both[:, row : row + 1] == codes_of(of_8_bits, [300], tokens)).mean() > 0.98


def test_a_cache_of_8_bits_is_shared_too(of_8_bits, reads):
    """Codes of both graphs mean the same: another scale, or none, would be far off."""
    session = of_8_bits
    first, second = session.new_cache(), session.new_cache()
    session.forward(TOKENS, first, "all")
    session.forward(TOKENS, second, "none")
    assert reads == [300]
    codes = [keys_and_values(cache).astype(np.float32) for cache in (first, second)]
    assert np.abs(codes[0]).max() <= 128
    assert close(codes[1], codes[0])
    assert not close(np.roll(codes[1], 1, axis=3), codes[0])


def test_a_shifted_prompt_is_told_apart(session, due):
    """Otherwise the tolerance above would show nothing."""
    cache = session.new_cache()
    session.forward(np.roll(TOKENS, 1), cache, "none")
    assert not close(keys_and_values(cache), due)


def test_the_last_token_has_logits(session, reads):
    logits = session.forward(TOKENS, session.new_cache(), "last")[0, 0].copy()
    assert reads == [299]
    cache = session.new_cache()
    true = session.forward(TOKENS, cache, "all")[0]
    wrong = np.abs(true[-2] - true[-1]).mean()
    assert np.abs(logits - true[-1]).mean() < 0.3 * wrong


def test_short_prompts_growing_caches_and_all_logits_use_the_first_graph(session, reads):
    session.forward(TOKENS[:, :24], session.new_cache(), "last")
    session.forward(TOKENS, session.new_cache(in_place=False), "none")
    session.forward(TOKENS, session.new_cache(), "all")
    assert reads == []


def test_a_cut_back_cache_is_continued(session, due, reads):
    cache = session.new_cache()
    session.forward(TOKENS[:, ::-1], cache, "none")
    cache.trim(0)
    session.forward(TOKENS[:, :200], cache, "none")
    session.forward(TOKENS[:, :40], cache, "none")
    cache.trim(200)
    session.forward(TOKENS[:, 200:], cache, "none")  # past 256 tokens the buffers have grown
    assert reads == [300, 200, 40, 100]
    assert close(keys_and_values(cache), due)


def test_two_sequences_at_once(session, due):
    cache = session.new_cache(batch=2)
    session.forward(np.concatenate([TOKENS, TOKENS[:, ::-1]]), cache, "none")
    both = keys_and_values(cache)
    assert close(both[:, :1], due)
    assert not close(both[:, 1:], due)


def test_generation_prefills_with_it(session, reads):
    events = list(
        generate(
            Context(session), TOKENS[0].tolist(), SamplingParams(max_tokens=3, ignore_eos=True), chunk=128
        )
    )
    assert [event.done for event in events if isinstance(event, Prefilled)] == [0, 128, 256, 300]
    assert reads == [128, 128, 43]
    assert sum(isinstance(event, Token) for event in events) == 3


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


def test_without_the_second_graph_nothing_of_it_is_opened(folder, reads):
    session = open_session(folder, prefill_graph=False)
    session.forward(TOKENS, session.new_cache(), "none")
    assert reads == []


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


def test_opened_later_it_makes_only_the_prompts_wait_that_need_it(folder, due, held):
    session = open_session(folder, prefill_graph="later")
    short = session.new_cache()
    session.forward(TOKENS[:, :8], short)  # too short for the second graph
    assert short.length == 8
    Timer(0.3, held.set).start()
    cache = session.new_cache()
    session.forward(TOKENS, cache, "none")
    assert held.is_set()
    assert close(keys_and_values(cache), due)


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
