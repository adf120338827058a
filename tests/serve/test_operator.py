"""What an operator relies on: what the start tells, keys from the environment, an end that does not wait."""

from __future__ import annotations

import signal
import threading
import time

import httpx

from tests.serve.serving import serve_process, until


def test_the_start_tells_what_slots_and_caches_take(tiny_export, tmp_path):
    log = tmp_path / "log"
    options = ["--engine", f"tiny={tiny_export}", "--slots", "3", "--prefix-cache-bytes", "5000000"]
    with serve_process(options, log):
        told = log.read_text().splitlines()[0]
    assert told.startswith("tiny: fp32, ")
    assert "3 slots of up to 1,024 tokens" in told
    assert "5.0 MB for beginnings of prompts" in told


def test_a_link_has_the_name_that_is_typed(tiny_export, tmp_path):
    """It had the name of the folder that it leads to, and clients were told that there is no such model."""
    (tmp_path / "small").symlink_to(tiny_export)
    with serve_process(["--engine", "./small/"], tmp_path / "log", folder=tmp_path) as (_, address):
        assert httpx.get(f"{address}/v1/models/small").status_code == 200


def test_keys_come_from_the_environment(tiny_export, tmp_path, monkeypatch):
    monkeypatch.setenv("QRUN_API_KEYS", "sk-one, sk-two")
    log = tmp_path / "log"
    with serve_process(["--engine", f"tiny={tiny_export}"], log) as (_, address):
        models = f"{address}/v1/models"
        assert httpx.get(models).status_code == 401
        for key in ("sk-one", "sk-two"):
            assert httpx.get(models, headers={"x-api-key": key}).status_code == 200
        assert "sk-" not in log.read_text()


def test_prompts_that_are_being_read_do_not_hold_up_the_end(tiny_export, tmp_path):
    """More prompts than can be read in the second that is given: they are cut off, and nothing is a fault."""
    log = tmp_path / "log"
    options = ["--engine", f"tiny={tiny_export}", "--threads", "1", "--drain-seconds", "1"]
    with serve_process(options, log) as (process, address):
        asked = {"model": "tiny", "prompt": "x" * 1000, "max_tokens": 20, "n": 16, "ignore_eos": True}

        def ask() -> None:
            while True:
                try:
                    httpx.post(f"{address}/v1/completions", json=asked, timeout=60)
                except httpx.TransportError:
                    return

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for each in clients:
            each.start()
        until(lambda: httpx.get(f"{address}/ready").json()["models"]["tiny"]["queued"] > 0)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - started < 15
        for each in clients:
            each.join(20)
            assert not each.is_alive()
    assert "Traceback" not in log.read_text()
