"""The load client and its report: if these fail, servers are compared by figures that are not theirs."""

from __future__ import annotations

from argparse import Namespace
from time import monotonic
from xml.etree import ElementTree

import pytest

from benchmarks.compare.records import Records
from benchmarks.serving import __main__ as program
from benchmarks.serving.chart import Line, lines
from benchmarks.serving.load import Load, measure, prompt
from benchmarks.serving.report import Cell, cell_of, key_of, own_cost, ratios, targets
from benchmarks.serving.servers import Server, running
from tests.fakes import fake_manifest, fake_model, repeating, tiny_tokenizer
from tests.serve.serving import serving

ONE, EIGHT, SHARED = Load(1), Load(8), Load(8, shared=1024)


def cell(*rates: float, first: float = 1.0) -> Cell:
    rounds = dict(enumerate(rates, 1))
    return Cell(rounds, {number: [first] * 2 for number in rounds}, rounds)


def test_everybody_is_asked_the_same_and_a_shared_beginning_is_shared():
    assert prompt(EIGHT, 3) == prompt(ONE, 3) != prompt(ONE, 4)
    one, other = prompt(SHARED, 1), prompt(SHARED, 2)
    assert one[:1024] == other[:1024]
    assert one[1024:] == prompt(ONE, 1)
    assert len(other) == 1024 + 256


def test_a_server_is_measured_over_http(tmp_path):
    """Tokens are those of the usage, and a refusal is an error and not a fast answer."""
    tokenizer = tiny_tokenizer(tmp_path)
    manifest = fake_manifest(context_length=512)
    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=manifest)
    load = Load(2, prompt=20, tokens=7, requests=3)
    with serving({"model": model}) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.serving.load._LEAST", 1)
        patch.setattr("benchmarks.serving.load._MOST", 200)
        found = measure(address, "model", load, 1)
        with pytest.raises(RuntimeError, match="404"):
            measure(address, "other", load, 1)
    assert [each["tokens"] for each in found["requests"]] == [7] * 6
    assert [each["prompt_tokens"] for each in found["requests"]] == [20] * 6
    assert all(0 < each["first"] <= each["whole"] for each in found["requests"])


def test_what_has_a_record_is_not_measured_again(tmp_path, monkeypatch):
    asked: list[Load] = []

    def measured(url, model, load, seed):
        asked.append(load)
        return {"seconds": 2.0, "requests": [{"first": 0.5, "whole": 1.0, "prompt_tokens": 4, "tokens": 64}]}

    class Running:
        def __enter__(self):
            return "http://nowhere"

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(program, "measure", measured)
    monkeypatch.setattr(program, "running", lambda server: Running())
    server, records = Server("a", ()), Records(tmp_path)
    program.one_round(records, server, [ONE], 1, monotonic() + 99)
    program.one_round(records, server, [ONE, EIGHT], 1, monotonic() + 99)
    assert [load for load in asked if load.tokens == 64] == [ONE, EIGHT]
    asked.clear()
    program.one_round(records, server, [ONE, EIGHT], 1, monotonic() + 99)
    program.one_round(records, server, [ONE, EIGHT], 2, monotonic() - 1)  # the time is over
    assert asked == []
    found = cell_of(records, {1: key_of(server, ONE, 1), 2: key_of(server, ONE, 2)})
    assert found == Cell({1: 32.0}, {1: [0.5]}, {1: 126.0})


def test_rounds_are_compared_in_pairs_and_what_is_not_ahead_is_said():
    ours, slow, fast = Server("ours", (), ours=True), Server("slow", ()), Server("fast", ())
    servers, loads = [ours, slow, fast], [ONE, EIGHT, SHARED]
    cells = {(server.title, load): cell(10, 20, 30) for server in servers for load in loads}
    cells["ours", ONE] = cell(12, 24, 33)
    cells["ours", EIGHT] = cell(20, 20, 30, first=3.0)
    cells["slow", SHARED] = cell(1, 1, 1)
    assert ratios({1: 2.0, 3: 9.0}, {1: 1.0, 2: 5.0, 3: 3.0}) == [2.0, 3.0]
    rows = {row[1]: row for row in targets(servers, loads, cells)}
    assert rows["output tokens/s, 1 client"][3:] == ["1.20 (1.10 to 1.20) times", "1.1 times", "yes"]
    assert rows["output tokens/s, 8 clients"][3:] == ["1.00 (1.00 to 2.00) times", "1.3 times", "**no**"]
    assert rows["output tokens/s, 8 clients, 1,024 shared"][2] == "fast"
    late = rows["95th percentile of the first token, 8 clients"]
    assert (late[3], late[5]) == ("3.00 times", "**no**")
    (cost,) = own_cost(servers, loads, cells, lambda server: {1: 12.0, 2: 25.0})
    assert cost[2:] == ["0.980 (0.960 to 1.000) times", "0.95", "yes"]


def test_a_server_that_does_not_start_is_an_error():
    with (
        pytest.raises(RuntimeError, match="no such"),
        running(Server("x", ("sh", "-c", "echo no such; exit 3"))),
    ):
        pass


@pytest.mark.parametrize("most", [0.03, 0.7, 9.0, 154.0, 2000.0])
def test_a_chart_is_drawn_within_its_frame(most):
    drawn = lines(
        "Title <&>", "unit", [Line("a <b>", [(1, most / 2, 0, most), (8, most, most, most)], ours=True)]
    )
    root = ElementTree.fromstring(drawn)
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2
    assert all(30 <= float(each.attrib["cy"]) <= 280 for each in circles)
    grid = [
        each for each in root.findall(".//{http://www.w3.org/2000/svg}line") if each.attrib["class"] == "grid"
    ]
    assert 4 <= len(grid) <= 10


def test_options_make_servers_and_loads():
    from pathlib import Path

    given = Namespace(
        **{"clients": "1,8", "prompt": 256, "tokens": 64, "requests": 2, "shared": 1024, "threads": 2},
        **{"qrun": [Path("/m/int4")], "qrun_options": "--queue 9", "gguf": [Path("/g/q4_0.gguf")]},
        **{
            "llama_server": Path("/b/llama-server"),
            "openvino": Path("/o/int4"),
            "openvino_python": Path("/p"),
        },
    )
    loads = program.loads_of(given)
    assert [load.name for load in loads] == ["1 client", "8 clients", "8 clients, 1,024 shared"]
    servers = program.servers_of(given, 8)
    assert [server.title for server in servers] == ["qrun int4", "llama-server q4_0", "OpenVINO GenAI int4"]
    assert [server.ours for server in servers] == [True, False, False]
    assert "--queue 9" in servers[0].facts["options"]
    assert all("{port}" in server.command for server in servers)
