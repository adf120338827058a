"""If these fail, a broken folder, a wrong wheel or a signal ends in a traceback or in silence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import Result

from qrun.backends.ort import wheels
from tests.commands import qrun, refused
from tests.fakes import REPOSITORY

GREEDY = ("--greedy", "--max-tokens", "5")


def test_generate_runs_an_export(tiny_export):
    result = qrun("generate", "--engine", tiny_export, "--prompt", "hi", "--json", "--threads", 1, *GREEDY)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["completion_tokens"] <= 5


def test_info_tells_sizes_and_the_verdict(tiny_export):
    result = qrun("info", tiny_export)
    assert result.exit_code == 0
    assert "tiny (Qwen2ForCausalLM" in result.stdout
    assert "768 B per token, 786 kB at full context" in result.stdout
    assert "verdict     not verified" in result.stdout
    assert "sizes checked" in result.stdout
    facts = json.loads(qrun("info", tiny_export, "--json", "--check-hashes").stdout)
    assert facts["hashes_checked"] is True
    assert facts["kv_cache"] == {
        "dtype": "float32",
        "bytes_per_token": 768,
        "bytes_at_full_context": 768 * 1024,
    }
    assert facts["total_bytes"] == sum((tiny_export / file["path"]).stat().st_size for file in facts["files"])


def test_info_names_a_broken_file(broken):
    path = broken / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert qrun("info", broken).exit_code == 0
    assert "model.onnx.data is altered" in refused(qrun("info", broken, "--check-hashes"))
    assert "model.onnx.data is altered" in refused(
        qrun("generate", "--engine", broken, "--prompt", "hi", "--check-hashes")
    )
    path.unlink()
    assert "model.onnx.data is missing" in refused(qrun("info", broken))


@pytest.mark.parametrize("command", [("chat",), ("generate", "--prompt", "hi")])
def test_a_bad_folder_is_one_message_and_exit_code_1(tmp_path, command):
    before = sorted(tmp_path.rglob("*"))
    message = refused(qrun(*command, "--engine", tmp_path / "nowhere"))
    assert message.startswith("error: no such model folder")
    assert "what to do:" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_an_engine_has_to_be_given():
    assert "--engine" in refused(qrun("chat"), 2)


# ONNX Runtime's wheels


def install(monkeypatch, *names: str, module: bool = True) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(wheels, "distribution", distribution)
    monkeypatch.setattr(wheels, "find_spec", lambda _: object() if module else None)


def run_tiny(folder: Path, *more: str) -> Result:
    return qrun("generate", "--engine", folder, "--prompt", "hi", *GREEDY, *more)


def test_without_onnx_runtime_the_first_command_says_what_to_install(tiny_export, monkeypatch):
    install(monkeypatch, module=False)
    message = refused(run_tiny(tiny_export))
    assert "ONNX Runtime is not installed" in message
    assert "pip install 'qconvert[cpu]'" in message


def test_with_both_wheels_the_first_command_says_how_to_mend_it(tiny_export, monkeypatch):
    install(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    message = refused(run_tiny(tiny_export))
    assert "both onnxruntime and onnxruntime-gpu are installed" in message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in message


def test_cuda_with_the_cpu_wheel_names_the_other_wheel(tiny_export, monkeypatch):
    install(monkeypatch, "onnxruntime")
    message = refused(run_tiny(tiny_export, "--device", "cuda"))
    assert "needs ONNX Runtime's GPU wheel" in message
    assert "'qconvert[gpu]'" in message


def test_cuda_that_is_not_there_is_no_silent_run_on_the_cpu(tiny_export, monkeypatch):
    install(monkeypatch, "onnxruntime-gpu")
    result = run_tiny(tiny_export, "--device", "cuda")
    assert "CUDAExecutionProvider is not available" in refused(result)


# processes


def qrun_process(*arguments: object, **options) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qrun.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_reader_that_leaves_early_hears_nothing_more(tiny_export):
    process = qrun_process(
        "generate", "--engine", tiny_export, "--prompt", "hi", "--raw", "--max-tokens", 900, "--threads", 1
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


# A job that a script started in the background ignores Ctrl-C, and its children with it: this one must not.
ENDLESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from qrun.cli import main as cli
from qrun.cli import options
from tests.fakes import REPOSITORY, fake_manifest, fake_model, repeating, tiny_tokenizer

tokenizer = tiny_tokenizer(Path(sys.argv.pop(1)))
model = fake_model(
    tokenizer, repeating(tokenizer, "la "), manifest=fake_manifest(context_length=10**7)
)
options.Model.open = lambda *_, **__: model
cli.main()
"""


def test_ctrl_c_outside_a_chat_ends_with_130_and_no_traceback(tmp_path):
    given = ("generate", "--engine", "x", "--prompt", "hi", "--raw", "--max-tokens", str(10**6))
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (130, b"")
    assert out.endswith(b"\n"), "the shell's prompt would stand behind half a line"


def test_an_old_locale_costs_a_character_and_not_the_answer(broken):
    folder = broken.rename(broken.parent / "model 模型")
    process = qrun_process("info", folder, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b"model ??" in out
