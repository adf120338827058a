"""If these fail, two models answer as one, or nobody is told why a node of a deployment does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from qrun.errors import QrunError
from qrun.scaling.cluster import refusal_in
from qrun.scaling.deploying import _state
from qrun.scaling.folders import folder_of
from qrun.scaling.replica import NAME, application
from tests.ray.conftest import until
from tests.ray.test_deploy import SAID, WITHOUT_HOST, command, deploying, refused, replicas
from tests.serve.raw import send

FIRST, SECOND = "home-1", "home-2"


@pytest.fixture
def homes(model, tmp_path, monkeypatch) -> dict[str, Path]:
    """The homes of two nodes, each with the model in it."""
    found = {name: tmp_path / name for name in (FIRST, SECOND)}
    for home in found.values():
        shutil.copytree(model, home / "model")
        (home / "model" / "model.onnx.data").chmod(0o644)
    monkeypatch.setenv("HOME", str(found[FIRST]))
    return found


@pytest.fixture
def address(homes):
    """A cluster of two nodes with a CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1, env_vars={"HOME": str(homes[SECOND])})
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def change(home: Path) -> None:
    """Put another model into a home."""
    path = home / "model" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replica_of(home: Path) -> psutil.Process:
    (found,) = [each for each in replicas() if each.environ()["HOME"] == str(home)]
    return found


def test_another_folder_on_one_node_is_told_and_never_answers(address, homes, tmp_path):
    asked = ("--engine", "tiny=~/model", "--ray", address, "--replicas", 2, "--ray-cpus", 1)
    extra = homes[SECOND] / "model" / "chat_template.jinja"
    extra.write_text("{{ messages[0].content }}")
    told = refused(*asked)
    assert "has another model folder: chat_template.jinja is there, and is not in that of" in told
    assert f"where: {extra}" in told
    extra.unlink()
    change(homes[SECOND])
    told = refused(*asked)
    assert "has another model folder: model.onnx.data is another file than that of" in told
    assert f"where: {homes[SECOND]}" in told
    assert "what to do: copy the folder to all nodes again, or remove it there: then it is copied" in told
    shutil.rmtree(homes[SECOND] / "model")
    shutil.copytree(homes[FIRST] / "model", homes[SECOND] / "model")
    log = tmp_path / "log"
    with deploying(log, *asked) as (_, found):
        assert send(found, WITHOUT_HOST).status == 400, "the parser of `qrun serve`, on others' clusters too"
        # Amid its life a node gets another export, and its replica has to start again.
        change(homes[SECOND])
        os.kill(replica_of(homes[SECOND]).pid, signal.SIGKILL)
        until(lambda: "a replica does not start" in log.read_text(), 90)
        assert "model.onnx.data is another file than that of" in log.read_text()
        assert f"where: {homes[SECOND]}" in log.read_text()
        body = {"model": "tiny", "messages": SAID, "max_tokens": 8, "temperature": 0}
        answers = [httpx.post(f"{found}/v1/chat/completions", json=body, timeout=60) for _ in range(6)]
        assert {each.status_code for each in answers} == {200}
        assert len({each.json()["choices"][0]["message"]["content"] for each in answers}) == 1
        assert [each.environ()["HOME"] for each in replicas()] == [str(homes[FIRST])]
    assert log.read_text().count("a replica does not start") == 1


def test_a_node_without_the_folder_of_a_config_file_is_told(address, homes):
    asked = ("--engine", "tiny=~/model", "--replicas", 2, "--print-config")
    text = subprocess.run(command(*asked), capture_output=True, text=True, check=True).stdout
    wishes = yaml.safe_load(text)["applications"][0]["args"]["wishes"]
    assert set(wishes["files"]) >= {"qconvert.json", "model.onnx.data", "tokenizer.json"}
    shutil.rmtree(homes[SECOND] / "model")
    ray.init(address=address, log_to_driver=False)
    try:
        app = serve.RunTarget(application(wishes), name=NAME, route_prefix="/")
        serve.run_many([app], wait_for_applications_running=False)
        until(lambda: _state()[1] == 1 and refusal_in(_state()[2]), 90)
        refusal = refusal_in(_state()[2])
        assert isinstance(refusal, QrunError)
        assert "has no model folder" in refusal.what
        assert refusal.where == str(homes[SECOND] / "model")
        assert refusal.hint == "copy the folder to this path of every node"
    finally:
        serve.shutdown()


def test_a_template_that_was_put_beside_the_export_is_a_part_of_the_folder(homes):
    """It was not compared, and copies of the folder were without it."""
    folder = homes[FIRST] / "model"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    (folder / "notes.txt").write_text("mine")
    files = folder_of(folder).files
    assert "additional_chat_templates/short.jinja" in files
    assert "notes.txt" not in files


def test_why_no_replica_starts_is_one_message(model):
    """It was: Failed to update the deployments."""
    told = refused("--engine", model, "--ray-cpus", 1, "--chat-template", "long")
    assert "no chat template is called 'long'" in told
    assert "does not start" not in told
