"""A cluster of two node processes on this machine, and a tiny model that both can read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="ray is not installed: make test-ray has an environment with it")

from ray.cluster_utils import Cluster  # noqa: E402

from qrun.batch.asking import Defaults  # noqa: E402
from qrun.batch.opening import Wanted  # noqa: E402
from qrun.batch.order import Order  # noqa: E402
from qrun.scaling.running import Cluster as Asked  # noqa: E402
from qrun.scaling.running import run_on_ray  # noqa: E402
from tests.qrun.conftest import exporter  # noqa: E402, F401

LINES = 400


@pytest.fixture(scope="session")
def model(exporter):  # noqa: F811
    """int8: a row has the same bits in any company."""
    return exporter("int8", max_position_embeddings=1024)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The head, and one more node."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    found.add_node(num_cpus=2)
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of prompts of several lengths."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": n, "prompt": f"Tell me about {'x' * (n % 40)} {n}."} for n in range(LINES)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def order(source: Path, tmp_path: Path) -> Order:
    """Greedy answers of 32 tokens."""
    return Order(source, tmp_path / "out", Wanted(column="prompt"), Defaults(32, {"temperature": 0}), rows=4)


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(cluster: Cluster, model: Path, order: Order) -> Run:
    """Runs the order on the cluster; gives the summary."""

    def go(order: Order = order, engine: Path = model, **asked: Any) -> dict[str, Any]:
        where = Asked(cluster.address, **{"cpus": 1, "file_rows": 64, **asked})
        places = str(order.input), str(order.output)
        return run_on_ray(
            order, engine, where, places=places, opening={}, literal=True, tell=lambda line: None
        )

    return go


def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def written(folder: Path) -> list[dict[str, Any]]:
    """All lines of an output."""
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
