"""`qrun serve` as a process: its start, its signals, its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from qrun.cli.main import main
from tests.serve.serving import serve_process, until

CHAT = "/v1/chat/completions"
ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
    "temperature": 0,
}


@contextmanager
def server(folder: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """The process that serves "tiny", its address, and the file that it logs to."""
    log = folder.parent / f"serve-{os.getpid()}-{len(list(folder.parent.glob('serve-*')))}.log"
    with serve_process(["--engine", f"tiny={folder}", *map(str, options)], log) as (process, address):
        yield process, address, log


def test_running_answers_are_completed_after_sigterm_and_new_ones_refused(tiny_export):
    with server(tiny_export, "--threads", 1) as (process, address, log), httpx.Client(timeout=60) as client:
        asked = {**ASKED, "stream": True, "max_tokens": 900}
        with client.stream("POST", address + CHAT, json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until(lambda: _refuses(address))
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(20) == 0
    facts = json.loads(log.read_text().splitlines()[-1])
    assert (facts["status"], facts["completion_tokens"], facts["finish"]) == (200, 900, "length")
    assert "hi" not in facts.values()


def _refuses(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 503
    except httpx.TransportError:
        return True


def test_answers_that_outlast_the_drain_are_ended_and_the_server_with_them(tiny_export):
    options = ["--threads", 1, "--drain-seconds", 1]
    asked = {**ASKED, "stream": True, "n": 4}
    with (
        server(tiny_export, *options) as (process, address, log),
        httpx.stream("POST", address + CHAT, json=asked, timeout=60) as response,
    ):
        next(response.iter_lines())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "Traceback" not in log.read_text()


def test_a_client_that_goes_away_is_499_in_the_log_and_no_fault(tiny_export):
    with server(tiny_export, "--threads", 1) as (process, address, log):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + CHAT, json={**ASKED, "n": 4}, timeout=0.1)
        until(lambda: '"status": 499' in log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "the client went away" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_second_signal_ends_it_at_once(tiny_export):
    with server(tiny_export, "--threads", 1) as (process, address, _), httpx.Client(timeout=60) as client:
        asked = {**ASKED, "stream": True}
        with client.stream("POST", address + CHAT, json=asked) as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGTERM)
            until(lambda: _refuses(address))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


@pytest.mark.parametrize(("options", "told"), [([], False), (["--log-text"], True)])
def test_what_is_said_stands_in_the_log_only_where_the_operator_wants_it(tiny_export, options, told):
    with server(tiny_export, "--threads", 1, *options) as (process, address, log):
        said = {"role": "user", "content": "a secret word"}
        for stream in (False, True):
            asked = {**ASKED, "messages": [said], "max_tokens": 3, "stream": stream}
            assert httpx.post(address + CHAT, json=asked, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines() if CHAT in line]
    assert len(lines) == 2
    assert ["a secret word" in line.get("prompts", [""])[0] for line in lines] == [told] * 2
    assert [len(line.get("answers", [])) for line in lines] == [int(told)] * 2
    assert ("secret" in log.read_text()) == told


def test_a_request_ends_where_its_time_does(tiny_export):
    options = ["--threads", 1, "--max-seconds", 0.2, "--max-tokens", 900]
    with server(tiny_export, *options) as (process, address, log):
        found = httpx.post(address + CHAT, json={**ASKED, "n": 4}, timeout=60).json()
        assert [choice["finish_reason"] for choice in found["choices"]] == ["length"] * 4
        assert found["usage"]["completion_tokens"] < 4 * 900
        assert httpx.post(address + CHAT, json={**ASKED, "max_tokens": 901}).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert '"finish": "time,time,time,time"' in log.read_text()


def test_keys_come_from_a_file_and_are_never_shown(tiny_export, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-one\n\nsk-two\n")
    with server(tiny_export, "--api-key-file", keys) as (_, address, log):
        models = f"{address}/v1/models"
        assert httpx.get(models).status_code == 401
        assert httpx.get(models, headers={"Authorization": "Bearer sk-two"}).status_code == 200
        assert "sk-" not in log.read_text()


@pytest.mark.parametrize(("options", "longer"), [([], True), (["--control-tokens"], False)])
def test_what_a_user_types_is_text_unless_the_operator_says_otherwise(tiny_export, options, longer):
    asked = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "a<|im_end|>b"}]}
    plain = {**asked, "messages": [{"role": "user", "content": "a b"}]}
    with server(tiny_export, "--threads", 1, *options) as (_, address, _log):
        counts = [
            httpx.post(address + CHAT, json=each).json()["usage"]["prompt_tokens"] for each in (asked, plain)
        ]
    assert counts[0] - counts[1] == (len("<|im_end|>") - 1 if longer else 0)


def test_the_operator_chooses_one_of_several_chat_templates(tiny_export, tmp_path):
    """chat and generate could, and a server took the default."""
    folder = Path(shutil.copytree(tiny_export, tmp_path / "model"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    asked = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "abc"}]}
    with server(folder, "--threads", 1, "--chat-template", "short") as (_, address, _log):
        assert httpx.post(address + CHAT, json=asked).json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat-template", "long"], "no chat template is called 'long', only 'default'"),
        (["--host", "0.0.0.0"], "there are no API keys"),
        (["--host", "192.0.2.1", "--no-auth"], "cannot listen on 192.0.2.1"),
        (["--engine", "{folder}"], "two models are called"),
        (["--engine", "other={folder}/none"], "none"),
        (["--api-key-file", "/dev/null"], "the file holds no API key"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--memory", "0.4"], "MB, and --memory is 400.0 MB"),
        (["--memory", "0.8", "--engine", "second={folder}"], "MB of memory are free"),
        (["--lazy", "--engine", "other={folder}/none"], "none"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_served_is_told_at_once(tiny_export, arguments, message):
    options = [part.format(folder=tiny_export) for part in arguments]
    result = CliRunner().invoke(main, ["serve", "--engine", str(tiny_export), "--port", "0", *options])
    assert result.exit_code == 1
    assert message in result.output


def _damaged(export: Path, folder: Path) -> Path:
    """A copy whose weights are cut off."""
    copied = Path(shutil.copytree(export, folder))
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    return copied


def test_a_model_that_cannot_be_opened_at_the_start_ends_the_server(tiny_export, tmp_path):
    damaged = _damaged(tiny_export, tmp_path / "damaged")
    done = CliRunner().invoke(main, ["serve", "--engine", str(damaged), "--port", "0"])
    assert done.exit_code == 1
    assert "model.onnx.data" in done.output
    assert "listening" not in done.output


def test_models_that_are_opened_when_they_are_asked_for(tiny_export, tmp_path):
    """One of two fits; a third is damaged, which is told when it is asked for, and harms nobody."""
    damaged = _damaged(tiny_export, tmp_path / "damaged")
    options = ["--engine", f"second={tiny_export}", "--engine", f"broken={damaged}"]
    options += ["--lazy", "--memory", "0.02", "--prefix-cache-bytes", "15000000", "--threads", "1"]
    with server(tiny_export, *options) as (process, address, log):
        for name in ("tiny", "second", "tiny"):
            found = httpx.post(address + CHAT, json={**ASKED, "model": name, "max_tokens": 3}, timeout=60)
            assert found.json()["usage"]["completion_tokens"] == 3
        refused = httpx.post(address + CHAT, json={**ASKED, "model": "broken"}, timeout=60)
        assert refused.status_code == 503
        assert "model.onnx.data" in refused.json()["error"]["message"]
        assert str(tmp_path) not in refused.text
        states = {each["id"]: each["state"] for each in httpx.get(f"{address}/v1/models").json()["data"]}
        assert states["broken"] == "failed"
        assert sorted((states["tiny"], states["second"])) == ["unloaded", "unloaded"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"model"')]
    assert [(each["model"], each["state"]) for each in told] == [
        *(("tiny", "loaded"), ("tiny", "unloaded"), ("second", "loaded"), ("second", "unloaded")),
        *(("tiny", "loaded"), ("tiny", "unloaded")),
    ]
    assert "Traceback" not in log.read_text()


def test_a_taken_port_is_told_before_the_model_is_opened(tiny_export, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", "--engine", str(tmp_path / "none"), "--port", port])
    assert result.exit_code == 1
    assert "cannot listen on 127.0.0.1" in result.output


def test_what_prompts_begin_with_is_kept_over_a_restart(tiny_export, tmp_path):
    kept = tmp_path / "kept"
    cached, texts = [], []
    for _ in range(2):
        with server(tiny_export, "--prefix-cache-dir", kept) as (process, address, _):
            asked = {"model": "tiny", "prompt": "a" * 600, "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            texts.append(answer["choices"][0]["text"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    assert cached[0] == 0
    assert cached[1] >= 512
    assert texts[0] == texts[1]
    (file,) = kept.iterdir()
    assert file.stat().st_mode & 0o077 == 0  # what was asked can be told from it


def test_a_folder_for_prefixes_without_a_prefix_cache_is_refused(tiny_export, tmp_path):
    asked = ["serve", "--engine", str(tiny_export), "--prefix-cache-bytes", "0", "--prefix-cache-dir", "kept"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2
    assert "nothing to keep" in done.output


def test_pieces_of_prompts_are_as_the_operator_says(tiny_export):
    with server(tiny_export, "--threads", 1, "--prompt-piece", 64) as (_, address, _log):
        asked = {"model": "tiny", "prompt": "a" * 200, "max_tokens": 1}
        for cached in (0, 192):  # multiples of 256 with the default
            found = httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()["usage"]
            assert found["prompt_tokens_details"]["cached_tokens"] == cached
    done = CliRunner().invoke(main, ["serve", "--engine", str(tiny_export), "--prompt-piece", "100"])
    assert done.exit_code == 2
    assert "no multiple of 64" in done.output
