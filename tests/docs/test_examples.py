"""The examples of a service and of a container: what they start is what the program takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from qrun.cli.main import main
from tests.fakes import REPOSITORY

EXAMPLES = REPOSITORY / "examples" / "serve"


def _commands() -> dict[str, list[str]]:
    unit = (EXAMPLES / "qrun.service").read_text()
    started = re.search(r"^ExecStart=\S+/qrun (.*)$", unit, re.MULTILINE)
    image = (EXAMPLES / "Dockerfile").read_text().replace("\\\n", "")
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", image, re.MULTILINE)
    assert started
    assert entry
    return {"unit": shlex.split(started[1]), "image": json.loads(entry[1])[1:]}


@pytest.mark.parametrize("name", ["unit", "image"])
def test_an_example_starts_the_server_with_options_that_it_has(name: str) -> None:
    command, *arguments = _commands()[name]
    serve = main.get_command(click.Context(main), command)
    assert serve is not None
    context = serve.make_context("serve", arguments)
    assert context.params["engines"]
    assert context.params["api_key_file"] is not None


def test_the_unit_stops_later_than_the_answers_have_time() -> None:
    unit = (EXAMPLES / "qrun.service").read_text()
    seconds = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    assert seconds > int(re.findall(r"--drain-seconds (\d+)", unit)[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "qrun.service"
    # Its program is not installed here.
    unit.write_text((EXAMPLES / "qrun.service").read_text().replace("/opt/qrun/venv/bin/qrun", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert "qrun.service" not in done.stderr, done.stderr


def test_the_image_installs_extras_that_there_are() -> None:
    import tomllib

    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("qrun.service", "Dockerfile"):
        found = re.findall(r"\[([a-z,]+)\]'", (EXAMPLES / name).read_text())
        assert found
        assert all(each in extras for group in found for each in group.split(","))
