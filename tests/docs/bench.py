"""A working folder in which the commands of the pages are typed as they stand."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import httpx
from click.testing import CliRunner

from tests.docs.batch_inputs import write_batch_inputs
from tests.docs.commands_page import PROGRAMS
from tests.docs.tables import GGUF_FILES, MADE_BY, SERVER, SMALLER, STANDS_FOR, TYPED
from tests.fakes import REPOSITORY
from tests.qconvert.ggufs import split
from tests.serve.serving import serve_process

GGUF = REPOSITORY / "tests" / "qconvert" / "data" / "gguf" / "qwen2-Q8_0.gguf"


class Bench:
    """``folder`` holds the checkpoint under every name that the pages give it.

    What a command makes stays for the next.
    """

    def __init__(self, folder: Path, checkpoint: Path, *, small: bool) -> None:
        self.folder, self.small = folder, small
        self._outputs: dict[str, str] = {}
        (folder / "demo").mkdir(parents=True)
        (folder / "keys").write_text("sk-one\n")
        shutil.copy(REPOSITORY / "examples" / "evaluation" / "questions.jsonl", folder)
        for name in ("checkpoint", "Qwen2.5-1.5B-Instruct", "demo/sample-model"):
            shutil.copytree(checkpoint, folder / name, copy_function=_link_or_copy)
        write_batch_inputs(folder)
        for name, parts in GGUF_FILES.items():
            if parts == 1:
                shutil.copyfile(GGUF, folder / name)
            else:
                split(GGUF, folder / name.split("-")[0], parts)

    def run(self, command: str) -> str:
        """What the command prints (both streams); a command that was run already is not run again.

        Raises:
            AssertionError: its exit code is not 0.
        """
        command = self.typed(command)
        if command not in self._outputs:
            self._make_what_it_needs(command)
            self._outputs[command] = self._run(command)
        return self._outputs[command]

    def python(self, lines: tuple[str, ...]) -> str:
        """What a Python block prints."""
        text = "\n".join(lines)
        self._make_what_it_needs(text)
        output = io.StringIO()
        with self._served(text) as text, self._here(), contextlib.redirect_stdout(output):
            exec(compile(text, "a block of the page", "exec", dont_inherit=True), {"__name__": "__main__"})
        return output.getvalue()

    def shell(self, lines: tuple[str, ...]) -> str:
        """What a shell block prints that asks the page's server."""
        with self._served("\n".join(lines)) as text:
            command = ["bash", "-euc", text]
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def _served(self, text: str):
        """The block as it stands; one that asks the page's server finds it at the port that it has here."""
        if SERVER not in text:
            yield text
            return
        self.run("qrun serve --engine ./small")
        log = self.folder / "serve.log"
        with serve_process(["--engine", "./small"], log, folder=self.folder) as (_, address):
            yield text.replace(SERVER, address)

    def typed(self, command: str) -> str:
        """The command with what stands here for the page's words."""
        for word, here in STANDS_FOR.items():
            command = re.sub(rf"(?<![\w./-]){re.escape(word)}(?![\w/-])", here, command)
        if self.small:
            for there, here in SMALLER.items():
                command = command.replace(there, here)
        return command

    def _make_what_it_needs(self, text: str) -> None:
        for name, maker in MADE_BY.items():
            made_here = maker in text or self.typed(maker) == text
            if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) and not made_here:
                self.run(maker)

    def _run(self, command: str) -> str:
        program, *arguments = shlex.split(command)
        if arguments[0] == "serve":
            return self._serve(arguments[1:])
        typed = next((text for start, text in TYPED.items() if command.startswith(start)), None)
        with self._here():
            done = CliRunner().invoke(PROGRAMS[program], arguments, input=typed)
        raised = f", {done.exception!r}" if done.exception else ""
        assert done.exit_code == 0, f"{command}\nends with {done.exit_code}{raised}\n{done.output}"
        return done.output

    def _serve(self, arguments: list[str]) -> str:
        """Start it, ask each of its models one thing, and end it."""
        log = self.folder / "serve.log"
        with serve_process(arguments, log, folder=self.folder) as (process, address):
            headers = {"Authorization": f"Bearer {(self.folder / 'keys').read_text().strip()}"}
            for model in httpx.get(f"{address}/v1/models", headers=headers).json()["data"]:
                asked = {"model": model["id"], "prompt": "Hello", "max_tokens": 2}
                answer = httpx.post(f"{address}/v1/completions", json=asked, headers=headers, timeout=60)
                assert answer.status_code == 200, answer.text
            process.terminate()
            assert process.wait(60) == 0
        return log.read_text()

    @contextlib.contextmanager
    def _here(self):
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(before)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def find_command(words: list[str]) -> tuple[click.Command | None, list[str]]:
    """The click command that ``words`` (program, command, ...) name, and the words after its name."""
    group = PROGRAMS.get(words[0])
    if group is None or len(words) < 2 or words[1] not in group.commands:
        return None, words[1:]
    return group.commands[words[1]], words[2:]
