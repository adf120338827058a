"""If one of these fails, a model id is not downloaded, or a failing hub is told unclearly.

The hub is an HTTP server on this machine that speaks the few endpoints a download needs; the product
runs in a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from qconvert.checkpoint.hub import resolve_source
from qconvert.errors import QconvertError
from tests.tiny import make_tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OF_GGUF = ("README.md", "tiny-q8_0.gguf")
FETCH = """
import sys
from qconvert.checkpoint.load import load_model, open_checkpoint, resolve_source
from qconvert.errors import QconvertError
try:
    revision = sys.argv[2] if len(sys.argv) > 2 else None
    checkpoint = open_checkpoint(resolve_source(sys.argv[1], revision=revision))
except QconvertError as error:
    sys.exit(f"refused: {error}")
load_model(checkpoint)
print(checkpoint.name, checkpoint.folder, *sorted(path.name for path in checkpoint.folder.iterdir()))
"""


class HubHandler(BaseHTTPRequestHandler):
    """org/tiny exists with one revision, org/gated is gated, everything else is unknown."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        name = path.rsplit("/", 1)[-1]
        if path.startswith(("/api/models/org/gated", "/org/gated")):
            self.reply(
                403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"}
            )
        elif path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            siblings = [{"rfilename": file} for file in self.files]
            self.reply_json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif path in ("/api/models/org/tiny-GGUF", "/api/models/org/tiny-GGUF/revision/main"):
            siblings = [{"rfilename": file} for file in OF_GGUF]
            self.reply_json({"id": "org/tiny-GGUF", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/org/tiny-GGUF/tree/"):
            self.reply_json([{"type": "file", "path": file, "size": 1, "oid": COMMIT} for file in OF_GGUF])
        elif path.startswith("/api/models/org/tiny/revision/") and not path.endswith(COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in self.files.items()
            ]
            self.reply_json(tree)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and name in self.files:
            etag = hashlib.sha1(self.files[name]).hexdigest()
            self.reply(200, self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(
                404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", sharded=True)
    HubHandler.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    HubHandler.files["pytorch_model.bin"] = b"\x80\x04pickle"
    HubHandler.files["modeling_evil.py"] = b"raise SystemExit('executed')"
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(endpoint: str, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    clean = {
        key: value for key, value in os.environ.items() if key not in proxies and not key.startswith("HF_")
    }
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", FETCH, *arguments]
    return subprocess.run(
        command, env=clean | settings | environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_model_id_is_downloaded_into_the_hubs_cache_and_opens(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/tiny")
    assert done.returncode == 0, done.stderr
    name, folder, *files = done.stdout.split()
    assert name == "tiny"
    assert Path(folder) == tmp_path / "hub/models--org--tiny/snapshots" / COMMIT
    assert "tokenizer.json" in files
    assert "model.safetensors.index.json" in files
    assert "pytorch_model.bin" not in files  # neither pickles
    assert "modeling_evil.py" not in files  # nor code


def test_a_cached_model_opens_while_the_hub_is_away(hub: str, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, "org/tiny").returncode == 0
    asked = len(HubHandler.requests)
    done = fetch(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(HubHandler.requests) == asked


def test_an_unknown_model(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/absent")
    assert "refused: There is no folder and no hub repository org/absent" in done.stderr
    assert f"{hub}/org/absent" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_repository_of_gguf_files_says_to_download_one(hub: str, tmp_path: Path) -> None:
    """ "There is no folder /home/.../snapshots/..." was said of a folder that nobody had named."""
    done = fetch(hub, tmp_path, "org/tiny-GGUF")
    assert "refused: org/tiny-GGUF has no config.json: it seems to hold GGUF files" in done.stderr
    assert "download one GGUF file of it" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gated_model(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/gated")
    assert "refused: org/gated is gated" in done.stderr
    assert "hf auth login" in done.stderr


def test_an_unknown_revision(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/tiny", "v99")
    assert "refused: org/tiny has no revision v99" in done.stderr


def test_a_hub_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    done = fetch(endpoint, tmp_path, "org/tiny")
    assert "refused: org/tiny is not in the cache and could not be downloaded" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_without_a_cache(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    assert "refused: org/tiny is not in the cache" in done.stderr


@pytest.mark.parametrize("source", ["./x", "/no/such", "~/no-such-folder", "a/b/c", "word", "../x/y", ""])
def test_a_path_that_does_not_exist_is_no_model_id(source: str) -> None:
    with pytest.raises(QconvertError, match="There is no folder"):
        resolve_source(source)


def test_an_existing_folder_wins_over_a_model_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("org/tiny") == Path("org/tiny")
    with pytest.raises(QconvertError, match="revision"):
        resolve_source("org/tiny", revision="main")


def test_a_model_of_modelscope_is_asked_for_without_pickles_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    (tmp_path / "config.json").touch()

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision))
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=download))
    assert resolve_source("org/tiny", hub="modelscope", revision="v1") == tmp_path
    assert asked == [("org/tiny", "v1")]


def test_modelscope_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(QconvertError, match="pip install"):
        resolve_source("org/tiny", hub="modelscope")
