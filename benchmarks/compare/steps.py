"""The steps that take long: models, environments, conversions, measurements, logits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import OURS, PEERS, Contender, Peer
from benchmarks.compare.records import Records, Result, StepFailedError
from benchmarks.measured import ProgramFailedError, run_measured

REPOSITORY = Path(__file__).resolve().parent.parent.parent
QUALITY_SHAPE = "sample"
_WEIGHTS = {".gguf", ".onnx", ".data", ".bin", ".xml", ".safetensors", ".onnx_data"}


@dataclass(frozen=True)
class Settings:
    """What all measurements of one run share."""

    prompts: tuple[int, ...]
    generate: int
    threads: int
    seconds: int  # longest that one measurement may take
    rows: tuple[int, ...] = ()
    rows_prompt: int = 256

    def key(self) -> dict[str, Any]:
        return {"prompts": list(self.prompts), "generate": self.generate, "threads": self.threads}


class Workshop:
    """The folder in which everything is made, and the records of it."""

    def __init__(self, folder: Path, *, retry_failed: bool, memory_limit: int | None) -> None:
        self.folder = folder
        self.records = Records(folder / "records", retry_failed=retry_failed)
        self.memory_limit = memory_limit
        for name in ("environments", "models", "converted", "logs", "logits"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def python(self, peer: Peer) -> Path:
        return self.folder / "environments" / peer.name / "bin" / "python"

    def model(self, shape: str) -> Path:
        return self.folder / "models" / shape

    def converted(self, contender: Contender, shape: str) -> Path:
        return self.folder / "converted" / f"{contender.peer.name}-{contender.variant}-{shape}"

    def environment(self, peer: Peer) -> Result:
        """A virtual environment with the peer's pinned packages."""
        key = {"peer": peer.name, "requirements": hash_text(peer.requirements), "build": peer.build}
        return self.records.once("environment", key, lambda: self._install(peer))

    def _install(self, peer: Peer) -> Result:
        log = self.folder / "logs" / f"environment-{peer.name}.log"
        if not self.python(peer).exists():
            self._run([sys.executable, "-m", "venv", str(self.python(peer).parent.parent)], log)
        pip = [str(self.python(peer)), "-m", "pip"]
        quiet = ["--progress-bar", "off", "--disable-pip-version-check"]
        run = self._run([*pip, "install", *quiet, "-r", str(peer.requirements)], log, extra=peer.build)
        if peer.unwanted:
            self._run([*pip, "uninstall", "--yes", *peer.unwanted], log)
        return run

    def checkpoint(self, shape: str) -> Result:
        """The model that all engines convert: random weights in one of ``SHAPES``, or the sample model."""

        def make() -> Result:
            folder, python = self.model(shape), str(self.python(PEERS[OURS]))
            if shape != QUALITY_SHAPE:
                command = [python, "-m", "benchmarks.make_random", shape, str(folder)]
            elif (folder / "sample-model.json").exists():
                return {}
            else:
                command = [python, "-m", "qconvert.cli", "sample", str(folder)]
            return self._run(command, self.folder / "logs" / f"model-{shape}.log", extra=_our_source())

        return self.records.once("model", {"shape": shape}, make)

    def conversion_key(self, contender: Contender, shape: str) -> dict[str, Any]:
        key = {
            "peer": contender.peer.name,
            "variant": contender.variant,
            "shape": shape,
            "requirements": hash_text(contender.peer.requirements),
        }
        # What we export changes with our own source; the other engines change with their pins.
        return {**key, "source": source_hash("qconvert")} if contender.ours else key

    def conversion(self, contender: Contender, shape: str) -> Result:
        """The checkpoint in the engine's own format, with the seconds and the memory that it took."""
        key = self.conversion_key(contender, shape)

        def convert() -> Result:
            destination = self.converted(contender, shape)
            log = self.folder / "logs" / f"conversion-{destination.name}.log"
            # The folder is about to hold another export: the record of the last one no longer holds.
            self.records.forget("conversion", key)
            shutil.rmtree(destination, ignore_errors=True)
            read_once(self.model(shape))
            command = [str(self.python(contender.peer)), str(contender.peer.program), "convert"]
            command += [str(self.model(shape)), str(destination), "--variant", contender.variant]
            try:
                run = self._run(command, log, limit=self.memory_limit)
            except StepFailedError:
                shutil.rmtree(destination, ignore_errors=True)
                raise
            return {**run, "model_bytes": model_bytes(destination)}

        return self.records.once("conversion", key, convert)

    @staticmethod
    def runtime_key(contender: Contender) -> dict[str, Any]:
        """What else a measurement of ours depends on: the source of qrun."""
        return {"runtime": source_hash("runtime")} if contender.ours else {}

    def measurement(self, contender: Contender, shape: str, number: int, settings: Settings) -> Result:
        """One process that loads the converted model and runs all workloads once."""
        key = {**self.conversion_key(contender, shape), "round": number, **settings.key()}
        key |= self.runtime_key(contender)

        return self.records.once(
            "measurement", key, lambda: {"result": self.measure_now(contender, shape, settings)}
        )

    def measure_now(self, contender: Contender, shape: str, settings: Settings) -> Result:
        """The same without a record."""
        asked = ["--prompts", ",".join(map(str, settings.prompts)), *self._lengths(shape, settings)]
        return self._ask(contender, "measure", shape, asked, settings)

    def rows(self, contender: Contender, shape: str, number: int, settings: Settings) -> Result:
        """One process that decodes several answers at once."""
        key = {**self.conversion_key(contender, shape), "round": number, "threads": settings.threads}
        key |= {"rows": list(settings.rows), "prompt": settings.rows_prompt, "generate": settings.generate}
        asked = ["--rows", ",".join(map(str, settings.rows)), "--prompts", str(settings.rows_prompt)]
        asked += self._lengths(shape, settings)
        return self.records.once(
            "rows",
            key | self.runtime_key(contender),
            lambda: {"result": self._ask(contender, "rows", shape, asked, settings)},
        )

    def guesses(self, contender: Contender, texts: Path, number: int, settings: Settings) -> Result:
        """One process that continues texts by the sample model without and with guessed tokens."""
        key = {**self.conversion_key(contender, QUALITY_SHAPE), "round": number, "threads": settings.threads}
        key |= {"texts": hash_text(texts)} | self.runtime_key(contender)
        asked = ["--texts", str(texts)]
        return self.records.once(
            "guesses",
            key,
            lambda: {"result": self._ask(contender, "guesses", QUALITY_SHAPE, asked, settings)},
        )

    def _lengths(self, shape: str, settings: Settings) -> list[str]:
        vocabulary = json.loads((self.model(shape) / "config.json").read_text())["vocab_size"]
        return ["--generate", str(settings.generate), "--vocabulary", str(vocabulary)]

    def _ask(
        self, contender: Contender, verb: str, shape: str, asked: list[str], settings: Settings
    ) -> Result:
        """What an engine's program answers, with its files in the page cache."""
        folder = self.converted(contender, shape)
        read_once(folder)
        command = [str(self.python(contender.peer)), str(contender.peer.program), verb, str(folder)]
        command += ["--variant", contender.variant, "--threads", str(settings.threads), *asked]
        return self._answer(command, f"{verb}-{folder.name}", settings)

    def _answer(self, command: Sequence[str], name: str, settings: Settings) -> Result:
        """The JSON object in the last line of a program's output."""
        log = self.folder / "logs" / f"{name}.log"
        environment = _environment({"OMP_NUM_THREADS": str(settings.threads)})
        with log.open("wb") as errors:
            try:
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    timeout=settings.seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise StepFailedError(f"took longer than {settings.seconds} s") from None
        lines = done.stdout.decode().strip().splitlines()
        if done.returncode != 0 or not lines:
            raise StepFailedError(f"exit code {done.returncode}: {last_words(log)}")
        answer: Result = json.loads(lines[-1])
        return answer

    def logits(self, contender: Contender, tokens: Path, output: Path) -> None:
        """Write the logits of all positions of a text, by the converted sample model."""
        folder = self.converted(contender, QUALITY_SHAPE)
        command = [str(self.python(contender.peer)), str(contender.peer.program), "logits", str(folder)]
        command += ["--variant", contender.variant, "--tokens", str(tokens), "--output", str(output)]
        self._run(command, self.folder / "logs" / f"logits-{folder.name}.log")

    def run_ours(self, command: Sequence[str], log: str) -> Result:
        """A program of this repository, in our own environment."""
        return self._run([str(self.python(PEERS[OURS])), *command], self.folder / "logs" / log)

    def _run(
        self,
        command: Sequence[str],
        log: Path,
        *,
        extra: dict[str, str] | None = None,
        limit: int | None = None,
    ) -> Result:
        try:
            run = run_measured(
                command, log, cwd=REPOSITORY, environment=_environment(extra or {}), limit_bytes=limit
            )
        except ProgramFailedError as error:
            raise StepFailedError(last_words(log, str(error).splitlines()[0])) from None
        return {"seconds": run.wall_seconds, "cpu_seconds": run.cpu_seconds, "peak_bytes": run.peak_bytes}


def _our_source() -> dict[str, str]:
    return {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'runtime'}"}


def our_environment() -> dict[str, str]:
    """For a program of this repository."""
    return _environment({})


def _environment(extra: dict[str, str]) -> dict[str, str]:
    """No hub, no telemetry, and our own source for our own programs (the others never import it)."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet, **_our_source(), **extra}


def hash_text(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def source_hash(folder: str) -> str:
    """Of all Python files and texts of a folder of this repository, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (REPOSITORY / folder).rglob("*") if p.suffix in (".py", ".txt")):
        digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def model_bytes(folder: Path) -> int:
    """Graph and weights; tokenizers apart, since not every engine needs one."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.suffix in _WEIGHTS and "tokenizer" not in path.name
    )


def read_once(folder: Path) -> None:
    """Bring the files into the page cache, so that no engine pays for a cold disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def last_words(log: Path, fallback: str = "no message") -> str:
    """What a failed program said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else fallback)[-400:]
