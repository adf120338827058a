"""If these fail, a job on several machines loses or doubles rows, or gives other answers than one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import qrun
from qrun.batch import running
from qrun.batch.asking import Defaults
from qrun.batch.opening import Wanted
from qrun.errors import QrunError
from qrun.scaling.cluster import nodes
from tests.ray.conftest import LINES, until, written

WORKER = "Worker"


def answers(rows):
    """The answer of each line, by its id."""
    assert len(rows) == len({row["id"] for row in rows}) == LINES, "lost 0, doubled 0"
    return {row["id"]: row["answer"] for row in rows}


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """What one machine answers."""
    found = {}

    def go(order):
        key = (order.input.read_text(), str(order.defaults))
        if key not in found:
            output = tmp_path_factory.mktemp("alone") / "answers.jsonl"
            running.run(replace(order, output=output), qrun.open(model, threads=1))
            found[key] = answers([json.loads(line) for line in output.read_text().splitlines()])
        return found[key]

    return go


def workers() -> list[psutil.Process]:
    """Processes that answer."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if words.startswith("ray::") and WORKER in words:
            found.append(process)
    return found


class Meanwhile(threading.Thread):
    """Does something as soon as the first answers are written, and keeps what that raised."""

    def __init__(self, order, what):
        super().__init__(daemon=True)
        self._order, self._what, self.error, self.files = order, what, None, 0
        self.start()

    def run(self):
        try:
            output = self._order.output
            until(lambda: self._written(output), 120)
            self.files = self._written(output)
            self._what()
        except BaseException as error:
            self.error = error

    def _written(self, output: Path) -> int:
        return len(list(output.parent.glob(f".{output.name}.*/*.jsonl")))

    def check(self):
        self.join(60)
        assert self.error is None, self.error
        assert self.files * 64 < LINES, "it happened in the middle"


def test_two_nodes_answer_as_one_machine_does(run, order, alone):
    summary = run()
    assert answers(written(order.output)) == alone(order)
    assert (summary["lines"], summary["answered"], summary["errors"]) == (LINES, LINES, {})
    assert sorted(each.name for each in order.output.parent.iterdir()) == ["out", "prompts.jsonl"]


def test_sampled_answers_are_those_of_one_machine_too(run, order, alone):
    """Seeds follow from a line's number in its file."""
    sampled = replace(order, defaults=Defaults(8, {"temperature": 1.0}, seed=7))
    run(sampled)
    assert answers(written(order.output)) == alone(sampled)


def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(run, order, alone):
    killed = []

    def kill():
        victim = workers()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    meanwhile = Meanwhile(order, kill)
    run()
    meanwhile.check()
    assert killed
    assert answers(written(order.output)) == alone(order)


def test_a_node_that_leaves_loses_and_doubles_nothing(run, order, alone, cluster):
    node = next(each for each in cluster.worker_nodes)
    meanwhile = Meanwhile(order, lambda: cluster.remove_node(node, allow_graceful=False))
    run()
    meanwhile.check()
    assert answers(written(order.output)) == alone(order)


def test_a_node_that_joins_in_the_middle_loses_and_doubles_nothing(run, order, alone, cluster):
    joined = []

    def join():
        ray = Path(sys.executable).with_name("ray")
        command = [ray, "start", "--address", cluster.address, "--num-cpus", "2", "--block"]
        joined.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    meanwhile = Meanwhile(order, join)
    try:
        run()
        meanwhile.check()
        assert joined[0].poll() is None
        until(lambda: len(nodes()) == 3, 60)
    finally:
        for process in joined:
            process.terminate()
            process.wait(60)
    assert answers(written(order.output)) == alone(order)


def test_a_line_that_cannot_be_answered_is_a_record(run, order):
    lines = order.input.read_text().splitlines()
    lines[7] = "{broken"
    lines[9] = json.dumps({"id": 9, "prompt": "x" * 3000})
    order.input.write_text("\n".join(lines) + "\n")
    summary = run(replace(order, defaults=Defaults(2, {"temperature": 0})))
    assert summary["lines"] == LINES
    assert summary["answered"] == LINES - 2
    assert sum(summary["errors"].values()) == 2
    bad = [row for row in written(order.output) if row["error"]]
    assert any("line 8 is not JSON" in row["error"] for row in bad)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_keep_their_columns_and_types(run, order, tmp_path, kind):
    import datetime

    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    days = [datetime.date(2026, 1, 1 + n % 28) for n in range(40)]
    table = pa.table({"text": [f'a, "b"\n{n}' for n in range(40)], "day": days, "n": list(range(40))})
    folder = tmp_path / "tables"
    folder.mkdir()
    for part in (0, 20):
        if kind == "csv":
            pa.csv.write_csv(table.slice(part, 20), folder / f"{part}.csv")
        else:
            pa.parquet.write_table(table.slice(part, 20), folder / f"{part}.parquet")
    defaults = Defaults(2, {"temperature": 0})
    run(replace(order, input=folder / f"*.{kind}", wanted=Wanted(column="text"), defaults=defaults))
    if kind == "parquet":
        found = pa.parquet.read_table(order.output)
        assert found.schema.field("day").type == pa.date32()
    else:
        found = pa.concat_tables([pa.csv.read_csv(path) for path in order.output.iterdir()])
    assert sorted(found["n"].to_pylist()) == list(range(40))
    assert {"text", "day", "n", "answer", "error", "completion_tokens"} <= set(found.column_names)


def test_another_folder_on_one_node_is_told_before_anything_runs(order, model, tmp_path, monkeypatch):
    """The folder is looked for in each node's own home, where one has an older export."""
    import shutil

    import ray
    from ray.cluster_utils import Cluster

    from qrun.scaling.running import Cluster as Asked
    from qrun.scaling.running import run_on_ray

    homes = [tmp_path / "home-1", tmp_path / "home-2"]
    for home in homes:
        shutil.copytree(model, home / "model")
    path = homes[1] / "model" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    monkeypatch.setenv("HOME", str(homes[0]))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        found.add_node(num_cpus=2, env_vars={"HOME": str(homes[1])})
        found.wait_for_nodes()
        asked = Asked(found.address, cpus=1)
        with pytest.raises(
            QrunError, match=r"another model folder: model\.onnx\.data is another file"
        ) as refusal:
            run_on_ray(
                order,
                Path("~/model"),
                asked,
                places=(str(order.input), str(order.output)),
                opening={},
                literal=True,
                tell=lambda line: None,
            )
        assert "home-2" in str(refusal.value)
        assert not order.output.exists()
        assert list(tmp_path.glob(".out*")) == []
        # Where there is none at all, it is copied there.
        shutil.rmtree(homes[1] / "model")
        told = []
        run_on_ray(
            replace(order, defaults=Defaults(2, {"temperature": 0})),
            Path("~/model"),
            asked,
            places=(str(order.input), str(order.output)),
            opening={},
            literal=True,
            tell=told.append,
        )
        assert any("was copied" in line for line in told)
        assert len(written(order.output)) == LINES
    finally:
        ray.shutdown()
        found.shutdown()


def test_a_cluster_that_is_started_here_does_not_report_its_use():
    """Ray does by default; asked here, and in a process of the cluster."""
    program = (
        "from qrun.scaling.cluster import join\n"
        "join('local')\n"
        "import ray\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(usage_stats_enabled(), ray.get(ray.remote(usage_stats_enabled).remote()))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"], done.stdout
