"""If these fail, a machine that only runs models has to install what converts them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.tiny import make_tiny_checkpoint

CONVERTERS = (
    "torch",
    "transformers",
    "qconvert",
    "onnx",
    "onnx_ir",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "gguf",
    "optimum",
)
# Stands before every other finder, so it sees each import first.
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {CONVERTERS}:
            raise ModuleNotFoundError(f"{{name}} is blocked: qrun must do without it", name=name)

sys.meta_path.insert(0, Blocked())
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, away from the repository, so that what is installed is found."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, input="hi\n", capture_output=True, text=True, check=False, cwd=sys.prefix)


def test_importing_qrun_and_its_help_import_nothing_that_converts():
    done = python(
        """
        import json, sys
        import qrun
        light = sorted(sys.modules)
        from qrun.cli.main import main
        try:
            main(["--help"])
        except SystemExit as leaving:
            assert leaving.code == 0
        print()
        print(json.dumps({"light": light, "all": sorted(sys.modules)}))
        """
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert not set(CONVERTERS) & set(modules["all"])
    assert "qrun.cli.main" in modules["all"]
    assert not {"onnxruntime", "numpy", "tokenizers"} & set(modules["light"])
    assert "onnxruntime" not in modules["all"], "--help need not wait for ONNX Runtime"


def test_every_name_that_qrun_promises_is_there():
    done = python(
        """
        import qrun
        assert all(getattr(qrun, name) for name in qrun.__all__)
        qrun.nothing
        """
    )
    assert "AttributeError: module 'qrun' has no attribute 'nothing'" in done.stderr


def test_generate_and_chat_run_where_nothing_that_converts_is_installed(tmp_path: Path):
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress

    source = make_tiny_checkpoint(tmp_path / "tiny")
    options = ExportOptions(precision="int8", output=tmp_path / "model", verify=False)
    folder = export(str(source), options, Progress(quiet=True)).folder
    run = BLOCK + "from qrun.cli.main import main; main()"
    given = ("--engine", folder, "--greedy", "--max-tokens", 4, "--threads", 1)

    done = python(run, "generate", *given, "--prompt", "hi", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["completion_tokens"] > 0

    done = python(run, "chat", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")

    blocked = python(BLOCK + "import torch")
    assert "torch is blocked" in blocked.stderr, "the hook blocks nothing, so this test shows nothing"
