"""If these fail, import-linter does not refuse an import that it should refuse."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("qconvert", "runtime/qrun")
LONGEST_FILE = 330

# By a contract's name: what breaks it, as lines that are added to files (some of them new).
BREAKS: dict[str, list[dict[str, str]]] = {
    "qrun never imports qconvert, torch, transformers or the export's libraries": [
        {"runtime/qrun/chat.py": "def late() -> None:\n    import transformers\n"},
        {"runtime/qrun/backends/kvcache.py": "import qconvert.errors\n"},
    ],
    "the proof owes nothing to the code that wrote what it reads": [
        {"qconvert/proof/compare.py": "import qconvert.calibration.text\n"},
        {"qconvert/progress.py": "import qconvert.lowering.nodes\n"},  # through another room
    ],
    "no circle between files or folders": [
        {"qconvert/formats/layout.py": "def late() -> None:\n    import qconvert.formats.stored\n"},
        {"qconvert/checkpoint/header.py": "if TYPE_CHECKING:\n    import qconvert.checkpoint.load\n"},
        {"runtime/qrun/chat.py": "if TYPE_CHECKING:\n    from qrun.model import Model\n"},
        {"runtime/qrun/folder/paths.py": "import qrun.cli.lines\n"},
    ],
    "qconvert's data moves one way": [
        {"qconvert/recipes/choose.py": "if TYPE_CHECKING:\n    from qconvert.targets import Target\n"},
        {"qconvert/sample.py": "import qconvert.proof.limits\n"},
        {"qconvert/attic/__init__.py": "", "qconvert/attic/room.py": "import qconvert.errors\n"},
    ],
    "a family is told in terms of the decoder's sizes": [
        {"qconvert/models/spec.py": "import qconvert.models.family\n"},
        {"qconvert/models/qwen2.py": "import qconvert.models.decoder\n"},
        {"qconvert/models/unplaced.py": ""},
    ],
    "a layout is found through formats.stored, and knows nothing of it": [
        {"qconvert/formats/halves.py": "import qconvert.formats.stored\n"},
        {"qconvert/formats/channels.py": "import qconvert.formats.columns\n"},
        {"qconvert/formats/unplaced.py": ""},
    ],
    "qrun's data moves one way": [
        {"runtime/qrun/text/tokenizer.py": "import qrun.backends.session\n"},
        {"runtime/qrun/errors.py": "import qrun.machine\n"},
        {"runtime/qrun/attic.py": ""},
    ],
    "a batch's data moves one way": [
        {"runtime/qrun/batch/lines.py": "import qrun.batch.sources\n"},
        {"runtime/qrun/batch/requests.py": "if TYPE_CHECKING:\n    import qrun.batch.asking\n"},
        {"runtime/qrun/batch/unplaced.py": ""},
    ],
    "a batch needs nothing of what HTTP needs": [
        {"runtime/qrun/batch/asking.py": "import qrun.serve.handlers\n"},
        {"runtime/qrun/serve/asking.py": "import qrun.serve.streams\n"},  # through the server's room
    ],
    "an evaluation's data moves one way": [
        {"runtime/qrun/evaluation/tasks.py": "import qrun.evaluation.summary\n"},
        {"runtime/qrun/evaluation/unplaced.py": ""},
    ],
    "a cluster's work moves one way": [
        {"runtime/qrun/scaling/folders.py": "import qrun.scaling.files\n"},
        {"runtime/qrun/scaling/unplaced.py": ""},
    ],
    "only qrun.scaling knows Ray": [
        {"runtime/qrun/batch/answering.py": "def late() -> None:\n    import ray\n"},
        {"runtime/qrun/cli/batch_ray.py": "import ray\n"},
    ],
    "one runtime knows nothing of the other": [
        {"runtime/qrun/backends/ort/cache.py": "import qrun.backends.trt.cuda\n"},
        {"runtime/qrun/backends/kvcache.py": "import qrun.backends.opening\n"},
    ],
    "one answer is a step of several, and its state knows nothing of them": [
        {"runtime/qrun/decoding/sequence.py": "import qrun.decoding.slots\n"},
        {"runtime/qrun/decoding/slots.py": "import qrun.decoding.scheduler\n"},
    ],
    "only qrun.backends and the proof know a runtime": [
        {"runtime/qrun/cli/info.py": "import onnxruntime\n"},
        {"qconvert/checkpoint/load.py": "def late() -> None:\n    import tensorrt\n"},
        {"runtime/qrun/decoding/slots.py": "from cuda.bindings import runtime\n"},
    ],
    "only qrun.serve knows HTTP": [
        {"runtime/qrun/chat.py": "import starlette\n"},
        {"qconvert/checkpoint/hub.py": "def late() -> None:\n    import http.client\n"},
    ],
    "only qrun.decoding knows how several sequences advance": [
        {"runtime/qrun/answer.py": "import qrun.decoding.scheduler\n"},
        {"runtime/qrun/chat.py": "from qrun.decoding.slots import Slots\n"},
    ],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the contracts are about."""
    copy = tmp_path_factory.mktemp("tree")
    for source in SOURCES:
        shutil.copytree(ROOT / source, copy / source, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """``lint-imports`` over a copy of the source."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--config", tree / "pyproject.toml"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'runtime'}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """KEPT or BROKEN, by the contract's name."""
    return dict(re.findall(r"^(.+) (KEPT|BROKEN)(?: \(.*\))?$", done.stdout, re.MULTILINE))


def test_every_contract_is_kept_and_has_an_import_that_breaks_it(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert verdicts(done) == dict.fromkeys(BREAKS, "KEPT")


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in BREAKS.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_forbidden_import_breaks_its_contract(tree: Path, name: str, change: dict[str, str]) -> None:
    before = {tree / path: (tree / path).read_text() for path in change if (tree / path).exists()}
    try:
        for path, lines in change.items():
            (tree / path).parent.mkdir(exist_ok=True)
            (tree / path).write_text(
                before.get(tree / path, "") + "\nfrom typing import TYPE_CHECKING\n" + lines
            )
        done = lint(tree)
        assert done.returncode == 1
        assert verdicts(done)[name] == "BROKEN", done.stdout
    finally:
        for path in change:
            if tree / path in before:
                (tree / path).write_text(before[tree / path])
            elif (tree / path).name == "__init__.py":
                shutil.rmtree((tree / path).parent)
            else:
                (tree / path).unlink(missing_ok=True)


def test_imports_by_name_stand_where_they_are_meant() -> None:
    """Contracts see import statements only: whoever imports by a name is listed here with the reason."""
    allowed = {
        "runtime/qrun/__init__.py",  # qrun's own names, when they are asked for
        "runtime/qrun/backends/trt/cuda.py",
        "runtime/qrun/backends/trt/checks.py",  # tensorrt or tensorrt_rtx
        "qconvert/tensorrt/backends.py",  # the same
        "qconvert/models/family.py",  # transformers' classes of a family
    }
    found = set()
    for path in (path for source in SOURCES for path in (ROOT / source).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "import_module",
                "__import__",
            ):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == allowed


def test_no_file_is_two_rooms() -> None:
    folders = ("qconvert", "runtime", "tests", "benchmarks")
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(lengths) > 200
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}
