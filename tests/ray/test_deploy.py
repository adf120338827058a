"""If these fail, `qrun deploy` answers otherwise than `qrun serve`, loses requests, or leaves something."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import ray
import yaml
from click.testing import CliRunner
from ray import serve as ray_serve

from qrun.cli.deploy import deploy
from qrun.errors import QrunError
from qrun.scaling.deploying import _end, config_file
from qrun.scaling.replica import application
from tests.ray.conftest import until
from tests.serve.raw import send

SAID = [{"role": "user", "content": "hello"}]
WITHOUT_HOST = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def engine(exporter):
    """With a context that an answer needs many seconds to fill."""
    return exporter("int8", max_position_embeddings=32768)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qrun.cli", "deploy", *map(str, arguments)]


@contextmanager
def deploying(log: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, and its address; at the end Ctrl-C, after which nothing of it is left."""
    before = {each.pid for each in ray_processes()}
    with log.open("w") as file:
        # A shell that runs these tests in the background has told them, and so the command, to ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command(*arguments, "--port", 0), stderr=file)
    try:
        said = "listening on "

        def listening() -> bool:
            assert process.poll() is None, log.read_text()
            return said in log.read_text()

        until(listening, 180)
        yield process, log.read_text().split(said)[1].split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    until(lambda: {each.pid for each in ray_processes()} <= before, 30)


def ray_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if words.startswith("ray::") or "raylet" in words or "gcs_server" in words:
            found.append(process)
    return found


def replicas() -> list[psutil.Process]:
    return [each for each in ray_processes() if "ServeReplica" in " ".join(each.info["cmdline"])]


@pytest.fixture(scope="module")
def address(engine, tmp_path_factory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("sk-test\n")
    log = keys.with_name("log")
    asked = ("--engine", f"tiny={engine}", "--replicas", 2, "--ray-cpus", 1, "--api-key-file", keys)
    with deploying(log, *asked) as (_, found):
        yield found


@pytest.fixture
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="sk-test", max_retries=5) as found:
        yield found


def ask(client: openai.OpenAI, **more):
    given = {"model": "tiny", "messages": SAID, "max_tokens": 8, "temperature": 0, **more}
    return client.chat.completions.create(**given)


def test_it_answers_as_the_server_does(client):
    assert [each.id for each in client.models.list()] == ["tiny"]
    whole = ask(client)
    assert whole.usage.completion_tokens > 0
    pieces = list(ask(client, stream=True))
    text = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 1
    called = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=200)
    assert called.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_errors_are_those_of_the_server(client, address):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        ask(client, model="other")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=-1)
    body = {"model": "tiny", "messages": SAID}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 401
    assert httpx.get(f"{address}/ready", headers={"host": "evil.example"}).status_code == 421
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def active(address: str) -> int:
    """Most answers at once that any of some requests for /ready tells of.

    They come together, since a single one always goes to the less busy replica.
    """
    with ThreadPoolExecutor(16) as pool:
        told = pool.map(lambda _: httpx.get(f"{address}/ready", timeout=30).json(), range(64))
        return max(each["models"]["tiny"]["active"] for each in told)


def never_ending(engine: Path) -> dict[str, int]:
    """A bias with which an answer goes on to its last token."""
    ends = json.loads((engine / "generation_config.json").read_text())["eos_token_id"]
    return {str(each): -100 for each in (ends if isinstance(ends, list) else [ends])}


def test_a_client_that_leaves_frees_its_slot(client, address, engine):
    stream = ask(client, stream=True, max_tokens=30_000, logit_bias=never_ending(engine))
    next(iter(stream))
    until(lambda: active(address) == 1, 20)
    stream.close()
    until(lambda: active(address) == 0, 20)


def test_a_killed_replica_loses_no_request_of_a_client_that_tries_again(client):
    """What runs on it is answered with an error, which the client's own retries meet; Ray starts another."""
    before = {each.pid for each in replicas()}
    assert len(before) == 2
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, client, max_tokens=400) for _ in range(24)]
        until(lambda: sum(each.done() for each in asked) >= 3, 60)
        assert not all(each.done() for each in asked)
        os.kill(min(before), signal.SIGKILL)
        texts = {each.result(120).choices[0].message.content for each in asked}
    assert len(texts) == 1, "greedy answers in int8 are the same on every replica"
    until(lambda: len({each.pid for each in replicas()}) == 2 and min(before) not in psutil.pids(), 90)
    assert ask(client).usage.completion_tokens > 0


def test_a_full_replica_says_so_and_a_running_stream_is_completed_after_sigterm(engine, tmp_path):
    """The stream was broken off without an end and without an error: Ray Serve kills its proxies first.

    What a full replica would have refused, or answered at once, waited in Ray's queue, which has no end.
    """
    asked = ("--engine", f"tiny={engine}", "--ray-cpus", 1, "--slots", 1, "--queue", 0)
    with deploying(tmp_path / "log", *asked) as (process, found):
        with openai.OpenAI(base_url=f"{found}/v1", api_key="-", max_retries=0, timeout=30) as client:
            stream = ask(client, stream=True, max_tokens=5000, logit_bias=never_ending(engine))
            next(stream)
            with pytest.raises(openai.RateLimitError) as refusal:
                ask(client)
            assert int(refusal.value.response.headers["retry-after"]) >= 1
            assert httpx.get(f"{found}/health").json() == {"status": "ok"}
            assert send(found, WITHOUT_HOST).status == 400, "the parser of `qrun serve`"
            process.send_signal(signal.SIGTERM)
            *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert process.wait(60) == 0


def refused(*arguments: object, code: int = 1) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_slips_are_one_message(engine, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen" in refused("--engine", engine, "--port", port)
    assert "qconvert.json" in refused("--engine", tmp_path)
    assert "there are no API keys" in refused("--engine", engine, "--host", "0.0.0.0")
    assert "no Ray cluster answers at 127.0.0.1:1" in refused("--engine", engine, "--ray", "127.0.0.1:1")
    both = ("--engine", engine, "--replicas", 2, "--max-replicas", 3)
    assert "--replicas has no place beside --max-replicas" in refused(*both, code=2)  # it was ignored
    assert "need --max-replicas" in refused("--engine", engine, "--min-replicas", 2, code=2)
    assert "has no place in a deployment" in refused("--engine", engine, "--threads", 2, code=2)


def test_a_config_file_is_what_serve_deploy_reads(engine):
    from ray.serve.schema import ServeDeploySchema

    asked = ("--engine", engine, "--max-replicas", "3", "--by-session", "--print-config")
    text = subprocess.run(command(*asked), capture_output=True, text=True, check=True).stdout
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (app,) = config.applications
    assert app.import_path == "qrun.scaling.replica:application"
    wishes = app.args["wishes"]
    assert application(wishes) is not None, "what Ray calls with these arguments"
    assert yaml.safe_load(config_file(wishes, 8080)) == yaml.safe_load(text)
    (deployment,) = app.deployments
    assert deployment.autoscaling_config["max_replicas"] == 3


REFUSED = "has no place in a deployment"
# How each option is given; None for those that are no part of what is deployed.
OPTIONS = {
    **dict.fromkeys(("engine", "ray", "print_config", "help")),
    **{"replicas": 2, "max_replicas": 2, "min_replicas": 2, "target_ongoing_requests": 9, "ray_cpus": 2},
    **{"by_session": True, "host": "::1", "port": 9, "slots": 9, "queue": 9, "prompt_piece": 192},
    **{"prefix_cache_bytes": 9, "api_key_file": "/dev/null", "control_tokens": True, "no_auth": True},
    **{"allowed_hosts": "a", "cors_origins": "https://a.example", "max_body_mb": 9, "max_tokens": 9},
    **{"max_seconds": 9, "log_text": True, "drain_seconds": 9, "speculate": True, "chat_template": "short"},
    **{"prefill_graph": False, "cuda_graph": False, "check_hashes": True, "suffix_cache_tokens": 9},
    **{"device": REFUSED, "threads": REFUSED, "verbose": REFUSED},
}
BESIDE = {"min_replicas": ("--max-replicas", 3), "target_ongoing_requests": ("--max-replicas", 3)}


def test_every_option_is_in_what_is_deployed_and_a_new_one_cannot_be_forgotten(engine, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-test\n")

    def printed(*arguments: object, code: int = 0) -> str:
        asked = ["--engine", engine, "--print-config", *arguments]
        result = CliRunner().invoke(deploy, list(map(str, asked)))
        assert result.exit_code == code, result.output
        return result.output

    plain = printed()
    for option in deploy.params:
        value = OPTIONS[option.name]
        name = option.secondary_opts[0] if value is False else option.opts[0]
        if value is None:
            continue
        if value == REFUSED:
            given = {"device": ("cpu",), "threads": (1,), "verbose": ()}[option.name]
            assert value in printed(name, *given, code=2)
            continue
        beside = BESIDE.get(option.name, ())
        given = (name,) if isinstance(value, bool) else (name, keys if value == "/dev/null" else value)
        assert printed(*given, *beside) != (printed(*beside) if beside else plain), name


def test_a_graph_s_path_is_its_folder_s(engine):
    asked = ["--engine", str(engine / "model.onnx"), "--print-config"]
    config = yaml.safe_load(CliRunner().invoke(deploy, asked).output)
    wishes = config["applications"][0]["args"]["wishes"]
    assert wishes["path"] == str(engine.resolve())


@ray_serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self) -> str:
        return "mine"


def test_a_cluster_where_ray_serve_runs_already_is_left_alone(cluster, engine):
    ray.init(address=cluster.address, log_to_driver=False)
    handle = ray_serve.run(Other.bind(), name="other")
    try:
        told = refused("--engine", engine, "--ray", cluster.address)
        assert "Ray Serve runs on this cluster already" in told
        assert handle.remote().result(timeout_s=30) == "mine"
    finally:
        ray_serve.shutdown()


def test_an_end_that_does_not_come_is_told():
    """Ctrl-C was followed by nothing for a minute, since Ray asked a controller that had been killed."""
    stuck = threading.Event()
    with pytest.raises(QrunError, match="has not ended within"):
        _end(stuck.wait, 0.1)
    stuck.set()
    _end(lambda: None, 10)
