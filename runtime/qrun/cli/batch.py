"""``qrun batch``: a file of prompts, answered."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.batch_ray import ray_options, run_with_ray, take_ray
from qrun.cli.batch_view import BatchProgress, summary_lines
from qrun.cli.options import (
    model_options,
    open_model,
    read_schema,
    sampling_options,
    take_sampling,
    template_option,
    template_variables,
    thinking_option,
)
from qrun.cli.terminal import note
from qrun.errors import QrunError

if TYPE_CHECKING:
    from qrun.batch.order import Order
    from qrun.model import Model


class _RowsType(click.ParamType):  # type: ignore[type-arg]
    """A whole number from 1 to 128, or None for "auto"."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        if not (str(value).isdecimal() and 1 <= int(value) <= 128):
            self.fail(f"{value!r} is neither auto nor a number from 1 to 128", param, ctx)
        return int(value)


@click.command(short_help="Answer a file of prompts.")
@model_options
@click.argument("source", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="The file to write: .jsonl, .csv or .parquet; with --ray a folder.",
)
@ray_options
@click.option(
    "--format",
    "kind",
    type=click.Choice(["jsonl", "csv", "parquet", "text"]),
    help="Of the input. [default: what its name and its first bytes say]",
)
@click.option("--column", help="The column that holds the prompt. [default: prompt, or the only one]")
@click.option("--template", help="The prompt in Jinja, over all columns: 'Translate: {{ text }}'.")
@click.option("--template-file", type=click.Path(path_type=Path), help="The same from a file.")
@click.option(
    "--chat/--raw",
    "templated",
    default=None,
    help="One turn of a chat, or continue the text as it is. [default: a chat if the model has a template]",
)
@click.option("--system", help="The system message of a chat.")
@template_option
@thinking_option
@click.option("--control-tokens", is_flag=True, help="Special tokens written out in a prompt act as such.")
@click.option("--schema", type=click.Path(path_type=Path), help="A JSON schema that each answer fits.")
@click.option("--regex", help="A regular expression that each whole answer matches.")
@click.option(
    "--tools", type=click.Path(path_type=Path), help="A JSON file with a list of tools, as in OpenAI's API."
)
@click.option("--tool-choice", metavar="auto|required|NAME", help="Which tool may or must be called.")
@click.option("--prefix", default="", metavar="TEXT", help="Before the names of the answer's columns.")
@click.option("--unordered", is_flag=True, help="Write each answer when it comes. [default: in input order]")
@click.option(
    "--rows",
    type=_RowsType(),
    default="auto",
    show_default=True,
    help="Prompts at once; auto measures how many are worth it and fit into memory.",
)
@click.option(
    "--prefix-cache-bytes",
    type=click.IntRange(min=0),
    default=512_000_000,
    show_default=True,
    help="Memory for beginnings of prompts that need not be read again; 0 keeps none.",
)
@click.option(
    "--max-errors",
    type=click.IntRange(min=0),
    help="Stop when more lines than this cannot be answered. [default: never]",
)
@click.option("--force", is_flag=True, help="Forget an earlier start of this job, and replace the output.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the summary as one JSON object and nothing else."
)
@sampling_options
def batch(
    *,
    source: str,
    output: str,
    kind: str | None,
    column: str | None,
    template: str | None,
    template_file: Path | None,
    templated: bool | None,
    system: str | None,
    thinking: bool | None,
    control_tokens: bool,
    schema: Path | None,
    regex: str | None,
    tools: Path | None,
    tool_choice: str | None,
    prefix: str,
    unordered: bool,
    rows: int | None,
    prefix_cache_bytes: int,
    max_errors: int | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer every line of INPUT, and go on where it was stopped when it is started again (docs/batch.md).

    INPUT holds OpenAI's batch lines, JSON lines, CSV, Parquet, or one prompt a line; - reads a pipe. A line
    that cannot be answered becomes a record that says why. Without --max-tokens an answer ends after 512
    tokens, or where generation_config.json says.
    """
    from qrun.batch.asking import Defaults
    from qrun.batch.opening import Wanted
    from qrun.batch.order import Order
    from qrun.batch.publishing import check_output

    for first, second in (
        (("--column", column), ("--template", template)),
        (("--column", column), ("--template-file", template_file)),
        (("--template", template), ("--template-file", template_file)),
        (("--schema", schema), ("--regex", regex)),
        (("--tools", tools), ("--schema", schema)),
        (("--tools", tools), ("--regex", regex)),
    ):
        if first[1] is not None and second[1] is not None:
            raise click.UsageError(f"Give either {first[0]} or {second[0]}.")
    if tool_choice is not None and tools is None:
        raise click.UsageError("--tool-choice needs --tools.")
    for name, value in {
        "--system": system,
        "--thinking": thinking,
        "--chat-template": options["chat_template"],
        "--tools": tools,
    }.items():
        if templated is False and value is not None:
            raise click.UsageError(f"{name} has no place in a --raw prompt.")
    sampling, ray = take_sampling(options), take_ray(options)
    if template_file is not None:
        template = _read_text(template_file)
    fields = {
        **_fields(sampling, schema, regex),
        **template_variables(thinking),
        **({} if tools is None else _tools(tools, tool_choice)),
    }
    defaults = Defaults(sampling.get("max_tokens"), fields, sampling.get("seed") or 0)
    pipe = sys.stdin.buffer if source == "-" else None
    wanted = Wanted(kind, column, template, system, templated is not False)  # type: ignore[arg-type]
    order = Order(
        None if pipe is not None else Path(source),
        Path(output),
        wanted,
        defaults,
        unordered=unordered,
        prefix=prefix,
        rows=rows,
        prefix_bytes=prefix_cache_bytes,
        max_errors=max_errors,
        force=force,
        pipe=pipe,
    )
    if ray["address"] is not None:
        summary = run_with_ray(order, (source, output), ray, options, templated, literal=not control_tokens)
        _tell(summary, output, as_json=as_json)
        return
    check_output(order)
    model = open_model(**options)
    model.literal = not control_tokens
    _run(order, model, templated, as_json=as_json)


def _run(order: Order, model: Model, templated: bool | None, *, as_json: bool) -> None:
    from dataclasses import replace

    from qrun.batch.running import run

    if templated is None and model.template is None:
        order = replace(order, wanted=replace(order.wanted, chat=False))
    with _terminated(), BatchProgress() as progress:
        try:
            summary = run(order, model, progress.show)
        except (KeyboardInterrupt, OSError):  # such as a full disk
            progress.close()
            note(progress.stopped())
            raise
    _tell(summary, str(order.output), as_json=as_json)


def _tell(summary: Mapping[str, Any], output: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    for line in summary_lines(summary, output):
        click.echo(line)


def _fields(sampling: dict[str, Any], schema: Path | None, regex: str | None) -> dict[str, Any]:
    """Options as fields of a request, for lines that do not have them."""
    left = {
        name: value for name, value in sampling.items() if name not in ("max_tokens", "seed", "do_sample")
    }
    if sampling.get("do_sample") is False:
        left["temperature"] = 0
    if "stop" in left:
        left["stop"] = list(left["stop"])
    if regex is not None:
        left["regex"] = regex
    if schema is not None:
        form = {"name": "answer", "schema": read_schema(schema)}
        left["response_format"] = {"type": "json_schema", "json_schema": form}
    return left


def _tools(path: Path, choice: str | None) -> dict[str, Any]:
    given = read_schema(path, "the list of tools")
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise QrunError(
            "the file must hold a list of tools",
            where=path,
            hint='[{"type": "function", "function": {"name": ..., "parameters": ...}}]',
        )
    if choice is None or choice in ("auto", "none", "required"):
        return {"tools": given, **({} if choice is None else {"tool_choice": choice})}
    return {"tools": given, "tool_choice": {"type": "function", "function": {"name": choice}}}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise QrunError(f"the template cannot be read: {error.strerror}", where=path) from error
    except UnicodeDecodeError:
        raise QrunError("the template is not UTF-8", where=path) from None


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does: what is answered is written to the disk."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
