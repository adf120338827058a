"""``qrun eval``: what a model folder is worth on one's own data, and what another one changes there."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from qrun.cli.bench import conditions
from qrun.cli.eval_view import as_lines
from qrun.cli.options import (
    model_options,
    open_model,
    template_option,
    template_variables,
    thinking_option,
)
from qrun.cli.terminal import printable
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.evaluation.asking import Asked, Result, check_tasks, results
from qrun.evaluation.matching import MATCHES, Match
from qrun.evaluation.page import page as html_page
from qrun.evaluation.report import Report
from qrun.evaluation.summary import measures
from qrun.evaluation.tasks import Task, read_tasks
from qrun.folder.manifest import find_model_folder, names_plan, read_manifest
from qrun.machine import give_back_memory
from qrun.model import Model, folder_template

_QUEUE = 64


@click.command("eval", short_help="Judge a model folder on your own data, and compare others with it.")
@click.argument("data", type=click.Path(path_type=Path))
@model_options
@click.option(
    "--against",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another folder, compared with that of --engine line by line; may be repeated.",
)
@click.option(
    "--match",
    type=click.Choice(list(MATCHES)),
    default="contains",
    show_default=True,
    help="How an answer is held against the expected one, for lines that do not say.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="End of an answer, in tokens.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends an answer; may be repeated.")
@click.option(
    "--chat/--raw",
    "templated",
    default=None,
    help="A prompt is one turn of a chat, or a text that is continued as it is. [default: a chat if "
    "the model of --engine has a template]",
)
@click.option("--system", help="The system message of lines that have none.")
@template_option
@thinking_option
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Prompts at once. With more than 1 the answers of int4 in long blocks may depend on each other.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the intervals.")
@click.option("--page", type=click.Path(path_type=Path), help="Write the report as an HTML page as well.")
@click.option("--force", is_flag=True, help="Replace the file of --page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def evaluate(
    *,
    data: Path,
    engine: Path,
    others: tuple[Path, ...],
    match: Match,
    max_tokens: int,
    stop: tuple[str, ...],
    templated: bool | None,
    system: str | None,
    thinking: bool | None,
    rows: int,
    seed: int,
    page: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Judge a model folder on the lines of DATA, JSON lines with what is asked and what is expected.

    A line has a prompt and the expected answer, a prompt with choices of which the likeliest is taken, or a
    text whose perplexity is measured: docs/evaluation.md. Answers are greedy. One folder is open at a time.
    """
    _check_raw(templated, system, options["chat_template"], thinking)
    tasks, digest = read_tasks(data, match)
    folders = (engine, *others)
    labels = _labels(folders)
    if page is not None:
        _check_page(page, data, force)
    sampling: dict[str, Any] = {"max_tokens": max_tokens, **({"stop": list(stop)} if stop else {})}
    name = options["chat_template"]
    if templated is None:
        has_template = folder_template(find_model_folder(engine), name) is not None
        templated = has_template or system is not None or thinking is not None
    asked = Asked(templated, system, template_variables(thinking), sampling)
    for folder in folders:
        check_tasks(folder, tasks, asked, name)
    described, found = list[dict[str, Any]](), list[list[Result]]()
    for folder, label in zip(folders, labels):
        started = perf_counter()
        model = open_model(engine=folder, **options)
        opened = perf_counter() - started
        started = perf_counter()
        found.append(_results(model, tasks, asked, rows, label))
        seconds = perf_counter() - started
        described.append(_described(model, folder, label, opened, seconds))
        del model
        gc.collect()  # a session may lie in a cycle, and its weights with it
        give_back_memory()
    facts = {
        "data": data.name,
        "sha256": digest,
        "lines": len(tasks),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "chat": bool(templated),
        "max_tokens": max_tokens,
        "stop": list(stop),
        "rows": rows,
        "seed": seed,
    }
    report = Report(facts, described, tasks, found, measures(tasks, labels, found, seed))
    failure = None
    if page is not None:
        try:
            _write(page, html_page(report), force)
        except (QrunError, OSError) as error:  # what was found, maybe in hours, is shown all the same
            failure = error
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        for line in as_lines(report):
            click.echo(printable(line))
    if failure is not None:
        raise failure


def _results(model: Model, tasks: Sequence[Task], asked: Asked, rows: int, label: str) -> list[Result]:
    """All results, in order."""
    plan = model.manifest.target != "onnxruntime"
    # A line's choices are queued together.
    queue = max(_QUEUE, 2 * rows, *(len(task.choices) for task in tasks))
    found: dict[int, Result] = {}
    with (
        Engine(model, slots=1 if plan else rows, queue=queue, prompts_first=True) as engine,
        _progress(label, len(tasks)) as done,
    ):
        for place, result in results(engine, tasks, asked):
            found[place] = result
            done()
    return [found[place] for place in range(len(tasks))]


def _described(model: Model, folder: Path, label: str, opened: float, seconds: float) -> dict[str, Any]:
    facts = conditions(model.session, opened)
    return {
        "label": label,
        "path": str(folder),
        **facts["model"],
        "device": facts["device"],
        "machine": facts["machine"],
        "versions": facts["versions"],
        "load_seconds": round(opened, 3),
        "seconds": round(seconds, 3),
    }


def _check_raw(
    templated: bool | None, system: str | None, template: str | None, thinking: bool | None
) -> None:
    if templated is False:
        given = {"--system": system, "--chat-template": template, "--thinking": thinking}
        for name, value in given.items():
            if value is not None:
                raise click.UsageError(f"{name} has no place with --raw.")


def _labels(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, as short as they can be told apart. All are looked at before one is opened.

    Raises:
        QrunError: one is no model folder, or stands twice.
    """
    names = list[tuple[str, ...]]()
    for folder in folders:
        read_manifest(folder)
        whole = folder.expanduser().resolve()
        if whole.suffix == ".onnx":
            whole = whole.parent
        elif names_plan(whole):
            whole = whole.parent / f"{whole.parent.name}.plan"
        if whole.parts in names:
            raise QrunError("this folder stands twice: it would be compared with itself", where=folder)
        names.append(whole.parts)
    depth = 1
    while len({name[-depth:] for name in names}) < len(names):
        depth += 1
    return ["/".join(name[-depth:]) for name in names]


def _check_page(path: Path, data: Path, force: bool) -> None:
    """Refuse a page that could not be written, before the hours of work for it."""
    if path.is_symlink() and not path.exists():
        raise QrunError("--page is a link to nowhere", where=path, hint="remove it, or give another name")
    if path.is_dir():
        raise QrunError("--page names a folder, not a file", where=path, hint="such as report.html")
    if path.exists() and not force:
        raise QrunError("the file exists already", where=path, hint="choose another name, or give --force")
    if path.exists() and path.samefile(data):
        raise QrunError("--page is the file of the data", where=path, hint="such as report.html")
    if not path.parent.is_dir():
        raise QrunError("there is no such folder for --page", where=path.parent, hint="make it first")
    if not os.access(path.parent, os.W_OK):
        raise QrunError("nothing can be written into the folder of --page", where=path.parent)


def _write(path: Path, text: str, force: bool) -> None:
    """Whole or not at all; a file that has appeared meanwhile is left alone without ``force``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".qrun-page.")
    written = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        written.chmod(0o666 & ~mask)  # as any other file that the user writes
        if force:
            written.replace(path)
            return
        try:
            os.link(written, path)
        except FileExistsError:
            raise
        except OSError:  # a disk without links
            if path.exists():
                raise FileExistsError from None
            written.replace(path)
    except FileExistsError:
        raise QrunError("the file has appeared meanwhile, and is left as it is", where=path) from None
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    """A bar over the lines, in a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(label), total=total)
        yield lambda: bar.advance(task)
