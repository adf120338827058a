"""If one of these fails, a damaged file ends in a traceback; its number makes the same file again.

``QCONVERT_MUTATIONS`` says how many of each kind are tried (``make test-mutations``: 3,000); some otherwise.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import click
import pytest
from click.testing import CliRunner

import qconvert.export
import qconvert.lowering.forecast
from qconvert.checkpoint.load import open_checkpoint
from qconvert.cli import main
from qconvert.export import ExportOptions, export
from qconvert.folder.companions import genai_config
from qconvert.formats.recipe import Recipe
from qconvert.models.families import rope_tables, spec_of
from qconvert.models.spec import DecoderSpec
from qconvert.progress import Progress
from qrun.cli.main import main as qrun_main
from qrun.errors import QrunError
from qrun.model import Model
from tests.qconvert.mutants import reseal
from tests.qconvert.mutating import mutated_copy, tried
from tests.tiny import CHAT_TEMPLATE, make_tiny_checkpoint

COUNT = int(os.environ.get("QCONVERT_MUTATIONS", "40"))
QUIET = Progress(quiet=True)
SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
OPTIONS = (
    ExportOptions("int8"),
    ExportOptions("int4", prefill=True, int8_kv_cache=True),
    ExportOptions("bf16", target="tensorrt"),
)


class ReachedTheWorkError(Exception):
    """Everything was judged, and the export would begin."""


def failure(act: Callable[[], object]) -> str | None:
    """The traceback of anything that is neither done nor refused."""
    try:
        act()
    except (QrunError, ReachedTheWorkError, click.UsageError):
        return None
    except Exception:
        return traceback.format_exc()
    return None


def command_failure(command: click.Group, *arguments: object) -> str | None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is None or isinstance(result.exception, SystemExit):
        return None
    return "".join(traceback.format_exception(result.exception))


@pytest.fixture
def nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> NoReturn:
        raise ReachedTheWorkError

    monkeypatch.setattr(qconvert.export, "new_model_folder", reached)


@pytest.fixture
def forecasts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forecast for each decoder and recipe: they take most of the time, and few files change a size."""
    known: dict[tuple[object, ...], dict[str, int]] = {}

    def data_bytes(lower: Any, spec: DecoderSpec, recipe: Recipe) -> dict[str, int]:
        key = (type(lower.__self__), spec, json.dumps(recipe.to_json(), sort_keys=True))
        if key not in known:
            known[key] = forecast.data_bytes(lower, spec, recipe)
        return known[key]

    forecast = SimpleNamespace(data_bytes=qconvert.lowering.forecast.data_bytes)
    monkeypatch.setattr(qconvert.lowering.forecast, "data_bytes", data_bytes)


@pytest.mark.usefixtures("nothing_is_written", "forecasts_are_kept")
@pytest.mark.parametrize("kind", ["tied", "sharded", "yarn"])
@pytest.mark.timeout(3000)
def test_damaged_checkpoints_are_refused_or_taken(
    tiny_templates: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    if kind == "yarn":
        source = make_tiny_checkpoint(tmp_path / "source", yarn=True, sliding=True)
    else:
        source = tiny_templates[kind]
    for path in source.iterdir():
        (template / path.name).symlink_to(path)
    (template / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (template / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    names = sorted(
        path.name for path in template.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")
    )
    weighted = names + list(SMALL) * 2

    def attempt(seed: int) -> str | None:
        folder, name = mutated_copy(template, tmp_path / "c", weighted, seed)
        options: Any = OPTIONS[seed % len(OPTIONS)]
        shown = () if seed % 3 == 0 else ("--json",)
        found = failure(lambda: export(str(folder), options, QUIET))
        found = found or failure(lambda: what_is_written_besides(folder))
        found = found or command_failure(main, "inspect", folder, *shown)
        return found and f"{name}: {found}"

    done, wrong = tried(COUNT, attempt)
    assert wrong == {}, "\n".join(f"--- {seed}\n{what}" for seed, what in list(wrong.items())[:5])
    assert done == COUNT


def what_is_written_besides(folder: Path) -> None:
    """What an export computes of the small files and writes after minutes of work."""
    checkpoint = open_checkpoint(folder)
    json.dumps(genai_config(checkpoint, spec_of(checkpoint.config)), allow_nan=False)
    rope_tables(checkpoint.config, 2)
    json.dumps(dict(checkpoint.config.rope_parameters), allow_nan=False)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.timeout(3000)
def test_damaged_exports_are_refused_or_answer(
    tiny_templates: dict[str, Path], tmp_path: Path, sealed: bool
) -> None:
    """``sealed``: the manifest agrees with the damaged file, as after an edit that was meant."""
    made = export(
        str(tiny_templates["tied"]), ExportOptions("int8", output=tmp_path / "m", verify=False), QUIET
    )
    names = [*SMALL, "qconvert.json", "qconvert.json", "genai_config.json"]

    def attempt(seed: int) -> str | None:
        folder, name = mutated_copy(made.folder, tmp_path / "d", names, seed)
        if sealed and name != "qconvert.json":
            reseal(folder)
        found = failure(lambda: answer(folder)) or command_failure(qrun_main, "info", folder)
        return found and f"{name}: {found}"

    done, wrong = tried(COUNT, attempt)
    assert wrong == {}, "\n".join(f"--- {seed}\n{what}" for seed, what in list(wrong.items())[:5])
    assert done == COUNT


def answer(folder: Path) -> None:
    model = Model.open(folder)
    model.resolve({})
    if model.template is None:
        list(model.generate("Hello", max_tokens=2))
    else:
        list(model.chat(max_tokens=2).send("Hello"))
