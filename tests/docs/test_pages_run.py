"""What the pages advertise is run: every command and every Python block, with the proof on."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tomllib

from tests.docs.bench import Bench, find_command
from tests.docs.commands_page import PROGRAMS
from tests.docs.reading import OURS, REPOSITORY, Block, Place, blocks, commands, pages
from tests.docs.tables import GGUF_FILES, MADE_BY, NOT_RUN, is_slow, why_not_run

ALL = [place for page in pages() for place in commands(page)]
DEMO_EXPORT = "qconvert export demo/sample-model --output demo/sample-model-onnx-int8 --force"
DEMO_QUESTION = 'qrun generate --engine demo/sample-model-onnx-int8 --prompt "Name the capital of France."'
CURL = [block for page in pages() for block in blocks(page) if block.lines[0].startswith("curl ")]
PYTHON = [block for page in pages() for block in blocks(page) if block.language == "python"]


def _is_name(place: Place) -> bool:
    """``qconvert build`` in a sentence names a command, and types none."""
    words = shlex.split(place.text)
    return words[0] in OURS and len(words) == 2 and not words[1].startswith("-")


# One of each text: the same command on several pages is the same command.
TYPED = list({place.text: place for place in ALL if not _is_name(place)}.values())
RUN = [place for place in TYPED if why_not_run(place.text) is None]


# README's are run by `make test`, those of all other pages by `make test-slow`.
SHORT = [
    pytest.param(place, marks=() if place.page == "README.md" else pytest.mark.slow, id=str(place))
    for place in RUN
    if not is_slow(place.text)
]


@pytest.mark.parametrize("place", SHORT)
def test_a_command_of_a_page_does_what_it_says(place: Place, small_bench: Bench) -> None:
    small_bench.run(place.text)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_a_python_block_of_a_page_runs(block: Block, small_bench: Bench) -> None:
    assert small_bench.python(block.lines).strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("block", CURL, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_with_curl_is_answered(block: Block, small_bench: Bench) -> None:
    found = json.loads(small_bench.shell(block.lines))
    assert found["choices"][0]["message"]["role"] == "assistant"
    assert found["usage"]["completion_tokens"] > 0


@pytest.mark.slow_docs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", RUN, ids=str)
def test_a_command_of_a_page_does_what_it_says_on_the_sample(place: Place, sample_bench: Bench) -> None:
    sample_bench.run(place.text)


@pytest.mark.slow_docs
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_a_python_block_of_a_page_runs_on_the_sample(block: Block, sample_bench: Bench) -> None:
    assert sample_bench.python(block.lines).strip()


def _printed(command: str) -> list[str]:
    """What README shows below a command of the demo."""
    block = next(block for page in pages() for block in blocks(page) if f"$ {command}" in block.lines)
    below = block.lines[block.lines.index(f"$ {command}") + 1 :]
    return list(itertools.takewhile(lambda line: not line.startswith("$ "), below))


def _shape(line: str) -> str:
    """A line without its figures, and without the folder where it ran."""
    line = re.sub(r"\S*/(demo/)", r"\1", line)
    return " ".join(re.sub(r"[+-]?\d[\d.,]*(e[+-]\d+)?", "#", line).split())


def test_the_readme_shows_the_table_that_an_export_prints(small_bench: Bench) -> None:
    """The heads of the columns, and every case and path: only figures depend on the model."""
    shown = [_shape(line) for line in _printed(DEMO_EXPORT)]
    printed = [
        _shape(line) for line in small_bench.run(MADE_BY["Qwen2.5-1.5B-Instruct-onnx-int8"]).splitlines()
    ]
    table = shown[: shown.index("")]
    assert len(table) > 10
    assert printed[: len(table)] == table


@pytest.mark.slow_docs
@pytest.mark.timeout(1800)
def test_the_demo_prints_what_the_readme_shows(sample_bench: Bench) -> None:
    printed = [_shape(line) for line in sample_bench.run(DEMO_EXPORT).splitlines()]
    table = [_shape(line) for line in _printed(DEMO_EXPORT)]
    assert printed[: table.index("")] == table[: table.index("")]
    assert any(line.startswith("PASSED in # s: int# on CPU") for line in printed)
    assert _printed(DEMO_QUESTION)[0] in sample_bench.run(DEMO_QUESTION)


def test_the_readme_has_commands_and_blocks_to_run() -> None:
    """A reader of pages that finds nothing would pass everything above."""
    readme = {place.text for place in RUN if place.page == "README.md"}
    assert {"qconvert export ./Qwen2.5-1.5B-Instruct", "qrun info ./small"} <= readme
    assert len(readme) >= 12
    assert [block.page for block in PYTHON].count("README.md") == 1


def test_every_mark_is_used() -> None:
    unused = [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, place.text) for place in TYPED)]
    assert not unused, f"no command of any page is meant by {unused}: remove these marks"


def test_every_maker_stands_on_a_page() -> None:
    assert set(MADE_BY.values()) <= {place.text for place in TYPED}


def test_every_command_of_ours_that_is_named_exists() -> None:
    strange = [
        str(place)
        for place in ALL
        if place.text.split()[0] in OURS and find_command(shlex.split(place.text))[0] is None
    ]
    assert not strange


def test_a_block_shows_a_command_of_ours_only_at_a_lines_beginning() -> None:
    """A command that the reader of pages overlooks is a command that nobody runs."""
    known = {(place.page, place.line) for place in ALL}
    names = "|".join(name for group in PROGRAMS.values() for name in group.commands)
    overlooked = [
        f"{block.page}:{number}: {line}"
        for page in pages()
        for block in blocks(page)
        if block.language != "python"
        for number, line in enumerate(block.lines, start=block.line)
        if re.search(rf"(^|[\s$|;&(])(qconvert|qrun) ({names})\b", line) and (block.page, number) not in known
    ]
    assert not overlooked


@pytest.mark.parametrize("place", [place for place in TYPED if place.text.startswith("make ")], ids=str)
def test_a_target_of_make_exists(place: Place) -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(place.text.split()[1:]) <= set(targets)


def test_an_extra_that_is_installed_exists() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra
        for place in TYPED
        if place.text.startswith("pip install")
        for extras in re.findall(r"\[([a-z,]+)\]", place.text)
        for extra in extras.split(",")
    }
    assert {"cpu", "gpu", "export", "rtx"} <= named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("place", [place for place in TYPED if "-m benchmarks." in place.text], ids=str)
def test_a_benchmark_has_the_options_that_are_named(place: Place) -> None:
    module = place.text.split()[2].removeprefix("benchmarks.").replace(".", "/")
    folder = REPOSITORY / "benchmarks"
    files = (
        [folder / f"{module}.py"]
        if (folder / f"{module}.py").is_file()
        else list((folder / module).glob("*.py"))
    )
    source = "\n".join(
        file.read_text(encoding="utf-8") for file in [*files, folder / "measured.py", folder / "report.py"]
    )
    missing = [
        word for word in shlex.split(place.text)[3:] if word.startswith("--") and f'"{word}"' not in source
    ]
    assert files
    assert not missing


def test_pages_name_no_folder_that_is_made_nowhere() -> None:
    """``--engine ./other`` without a command that makes ./other would be advice that nobody can follow."""
    for place in RUN:
        for word in shlex.split(place.text):
            if word.startswith("./") and "--output" not in place.text:
                known = {"checkpoint", "Qwen2.5-1.5B-Instruct", *MADE_BY, *GGUF_FILES}
                assert Path(word).parts[0] in known, str(place)
