"""If these fail, `pip install '.[cpu]'` does not do what docs/batch.md begins with."""

from __future__ import annotations

import json

from tests.batch.jobs import read_lines, request, write_lines
from tests.test_imports import BLOCK, CONVERTERS, python

LIGHT = (*CONVERTERS, "starlette", "uvicorn", "prometheus_client", "anyio", "httpx", "pyarrow")


def test_batch_lines_are_answered_where_only_the_runtime_is_installed(tiny_export, tmp_path):
    source = write_lines(tmp_path / "requests.jsonl", [request("a", "hello"), request("b", "you")])
    source.open("a").write(
        json.dumps({"custom_id": "c", "url": "/v1/responses", "body": {"input": "x"}})
        + "\n"
        + json.dumps({"custom_id": "d", "url": "/v1/messages", "body": {"max_tokens": 3, "messages": []}})
        + "\n"
    )
    block = BLOCK.replace(str(CONVERTERS), str(LIGHT))
    assert block != BLOCK
    run = block + "sys.modules['llguidance'] = None\nfrom qrun.cli.main import main; main()"
    given = ("--engine", tiny_export, "--threads", 1, "--max-tokens", 4, "--greedy", "--rows", 2)
    output = tmp_path / "answers.jsonl"
    done = python(run, "batch", *given, source, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answered"] == 3
    lines = read_lines(output)
    assert [line["response"]["status_code"] for line in lines] == [200, 200, 200, 400]
    assert lines[2]["response"]["body"]["object"] == "response"

    table = tmp_path / "table.csv"
    table.write_text("text\nhello\n")
    done = python(run, "batch", *given, table, "--output", tmp_path / "out.csv", "--regex", "a|b")
    assert done.returncode == 1
    assert "a regex needs llguidance" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl",
        "requests.jsonl",
        "table.csv",
    ]


def test_batch_help_waits_for_nothing(tmp_path):
    done = python(
        """
        import sys
        from qrun.cli.main import main
        try:
            main(["batch", "--help"])
        except SystemExit:
            pass
        print(sorted(name for name in sys.modules if name.split(".")[0] in
                     ("onnxruntime", "pyarrow", "starlette")))
        """
    )
    assert done.stdout.splitlines()[-1] == "[]"
