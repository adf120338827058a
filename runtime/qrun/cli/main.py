"""The ``qrun`` command: arguments in, exit code out (see ``CommandGroup``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from rich.console import Console

from qrun import __version__
from qrun.answer import Answer, Event, Piece
from qrun.chat import Chat
from qrun.cli.batch import batch
from qrun.cli.bench import Measured, conditions, measure, workloads
from qrun.cli.bench_view import as_csv_text, as_guesses, as_lines, as_table
from qrun.cli.console import ChatConsole, PrefillLine
from qrun.cli.deploy import deploy
from qrun.cli.eval import evaluate
from qrun.cli.group import CommandGroup
from qrun.cli.info import check, describe, lines
from qrun.cli.lines import decode_input
from qrun.cli.options import (
    COUNTS,
    draft_option,
    model_options,
    open_draft,
    open_engine,
    open_model,
    read_schema,
    sampling_options,
    speculate_option,
    take_sampling,
    tell_sampling,
    template_option,
    template_variables,
    thinking_option,
)
from qrun.cli.plan_info import check_plan, describe_plan, plan_lines
from qrun.cli.serve import serve
from qrun.cli.terminal import note, printable, size, working
from qrun.cli.wrapping import Shown
from qrun.decoding.generate import Prefilled
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes, names_plan, read_manifest
from qrun.folder.plan import read_plan
from qrun.model import Model
from qrun.sampling.params import DEFAULT

# A model that produces no end token would go on for minutes, to the end of its context.
DEFAULT_MAX_TOKENS = 512


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qrun")
def main() -> None:
    """Talk with a model folder that qconvert made."""


@main.command()
@model_options
@sampling_options
@template_option
@thinking_option
@speculate_option
@draft_option
@click.option("--literal", is_flag=True, help="Special tokens in what is typed stay text.")
@click.option("--system", help="The system message. [default: what the chat template says]")
def chat(system: str | None, literal: bool, thinking: bool | None, **options: Any) -> None:
    """Talk with the model, several turns.

    Lines come from a pipe or a terminal; /help lists the commands. In a terminal words wrap at its width,
    Ctrl-C stops an answer, and Ctrl-D leaves, also while an answer comes.
    """
    sampling = take_sampling(options)
    # The graph for prompts is opened while the user types the first question.
    model = open_model(**options | {"prefill_graph": options["prefill_graph"] and "later"})
    variables = template_variables(thinking)
    conversation = Chat(model, system, literal=literal, variables=variables, **sampling)
    if options["verbose"]:
        tell_sampling(*model.resolve(sampling))
    ChatConsole(conversation).run()


@main.command()
@model_options
@click.option("--prompt", help="The prompt; - reads it from stdin.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A UTF-8 file with the prompt.")
@click.option(
    "--chat/--raw",
    "templated",
    default=None,
    help="One turn of a chat, or continue the text as it is. [default: a chat if the model has a template]",
)
@click.option("--system", help="The system message of a chat.")
@template_option
@thinking_option
@speculate_option
@draft_option
@click.option("--literal", is_flag=True, help="Special tokens in the prompt stay text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--schema", type=click.Path(path_type=Path), help="A JSON schema that the answer fits.")
@click.option("--regex", help="A regular expression that the whole answer matches.")
@sampling_options
def generate(
    *,
    prompt: str | None,
    prompt_file: Path | None,
    templated: bool | None,
    system: str | None,
    literal: bool,
    thinking: bool | None,
    as_json: bool,
    schema: Path | None,
    regex: str | None,
    **options: Any,
) -> None:
    """Answer one prompt.

    Without --max-tokens an answer ends after 512 tokens, or where generation_config.json says.
    """
    if templated is False and system is not None:
        raise click.UsageError("--system has no place in a --raw prompt.")
    if templated is False and options["chat_template"] is not None:
        raise click.UsageError("--chat-template has no place in a --raw prompt.")
    if templated is False and thinking is not None:
        raise click.UsageError("--thinking has no place in a --raw prompt.")
    if schema is not None and regex is not None:
        raise click.UsageError("Give either --schema or --regex.")
    sampling = take_sampling(options)
    text = _read_prompt(prompt, prompt_file)
    form: dict[str, Any] = {"regex": regex, "schema": None if schema is None else read_schema(schema)}
    model = open_model(**options)
    ours = "max_tokens" not in sampling and model.generation_config.get("max_new_tokens") is None
    if ours:
        sampling["max_tokens"] = DEFAULT_MAX_TOKENS
    if templated is None:
        templated = model.template is not None or system is not None or thinking is not None
    if templated:
        variables = template_variables(thinking)
        events = Chat(model, system, literal=literal, variables=variables, **sampling).send(text, **form)
    else:
        events = model.generate(text, literal=literal, **form, **sampling)
    if options["verbose"]:
        params, sources = model.resolve(sampling)
        tell_sampling(params, sources | ({"max_tokens": DEFAULT} if ours else {}))
    # A text that is continued may be code, and a form's own line breaks matter.
    shown = None if as_json else Shown(wrap=templated and schema is None and regex is None)
    answer = _follow(events, model, shown, verbose=options["verbose"])
    if as_json:
        click.echo(json.dumps(answer.to_json(), ensure_ascii=False))


@main.command(short_help="Tell what a model folder or a .plan is, and costs.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--check-hashes", is_flag=True, help="Compare every file with its SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def info(path: Path, check_hashes: bool, as_json: bool) -> None:
    """Tell what PATH is, a model folder or a .plan: whether it is whole, what it costs, if it runs here.

    Exit code 0 also where this machine cannot run it; 1 where it is broken.
    """
    if names_plan(path):
        plan, manifest = read_plan(path), read_manifest(path)
        if check_hashes:
            check_plan(plan)
        facts, view = describe_plan(plan, manifest, hashes_checked=check_hashes), plan_lines
    else:
        manifest = read_manifest(path)
        check(manifest, hashes=check_hashes)
        facts, view = describe(manifest, hashes_checked=check_hashes), lines
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for line in view(facts):
        click.echo(printable(line))


@main.command(short_help="Measure the speed of prompts and of generation.")
@model_options
@click.option(
    "-p",
    "--prompt-tokens",
    "prompts",
    type=COUNTS,
    default="512",
    show_default=True,
    help="Lengths of the prompt.",
)
@click.option(
    "-n",
    "--generated-tokens",
    "generated",
    type=COUNTS,
    default="64",
    show_default=True,
    help="Tokens to generate after it.",
)
@click.option(
    "-d",
    "--depth",
    "depths",
    type=COUNTS,
    default="0",
    show_default=True,
    help="Tokens in the KV cache before the prompt.",
)
@click.option(
    "--rows",
    type=COUNTS,
    default="1",
    show_default=True,
    help="Prompts at once. Rates are of all of them together.",
)
@speculate_option
@draft_option
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Counted rounds, after one to warm up.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values and nothing else.")
def bench(
    *,
    prompts: tuple[int, ...],
    generated: tuple[int, ...],
    depths: tuple[int, ...],
    rows: tuple[int, ...],
    repetitions: int,
    speculate: bool,
    draft: Path | None,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Measure how fast the model reads prompts and generates tokens here.

    Lengths may be lists, such as 128,512,2048: every combination is measured. Figures are medians, with
    their range in brackets. Close other programs first.
    """
    if as_json and as_csv:
        raise click.UsageError("Give either --json or --csv.")
    if draft is not None and rows != (1,):
        raise click.UsageError("--draft is for one answer at a time: --rows 1.")
    started = perf_counter()
    session = open_engine(**options)
    guessing = None if draft is None else open_draft(draft, **options)
    load_seconds = perf_counter() - started
    measured: list[Measured] = []
    rounds: dict[str, Any] = {"repetitions": repetitions, "speculate": speculate, "draft": guessing}
    for workload in workloads(prompts, generated, depths, rows):
        what = (
            f"prompt {workload.prompt_tokens:,}, new {workload.generated_tokens:,}, depth {workload.depth:,}"
            + (f", rows {workload.rows}" if workload.rows > 1 else "")
        )
        with working(f"measuring: {what}"):
            *_, result = measure(session, workload, **rounds)
        measured.append(result)
    facts = conditions(session, load_seconds, guessing)
    common = {name: facts[name] for name in ("load_seconds", "peak_rss_bytes")}
    results = [{**result.to_json(), **common} for result in measured]
    if as_json:
        click.echo(json.dumps({**facts, "results": results}, indent=2, ensure_ascii=False))
    elif as_csv:
        click.echo(as_csv_text(results), nl=False)
    else:
        Console().print(as_table(measured))
        if speculate or guessing is not None:
            click.echo(as_guesses(measured))
        for line in as_lines(facts):
            click.echo(printable(line))


main.add_command(batch)
main.add_command(deploy)
main.add_command(evaluate)
main.add_command(serve)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("Give either --prompt or --prompt-file.")
    if prompt_file is not None:
        try:
            text = decode_input(prompt_file.read_bytes())
        except OSError as error:
            raise QrunError(f"the prompt file cannot be read: {error.strerror}", where=prompt_file) from error
    elif prompt == "-":
        text = decode_input(sys.stdin.buffer.read())
    else:
        text = prompt or ""
    if not text.strip():
        raise QrunError("the prompt is empty: there is nothing to answer", hint="give some text")
    return text


def _follow(events: Any, model: Model, shown: Shown | None, *, verbose: bool) -> Answer:
    """Print the pieces while they come; returns the last event."""
    progress = PrefillLine()
    event: Event | None = None
    try:
        for event in events:
            if isinstance(event, Prefilled):
                progress.update(event)
                if verbose and event.done < event.total:
                    verbose = False
                    tokens = f"{event.total:,} tokens of prompt"
                    note(f"{tokens}: {size(forecast_bytes(model.manifest, event.total))} of KV cache")
            elif isinstance(event, Piece) and shown:
                progress.clear()
                shown.show(event.text)
    finally:
        progress.clear()
        # Also after Ctrl-C, so that the shell's prompt begins on a line of its own.
        if shown and shown.begun:
            shown.end()
    assert isinstance(event, Answer), "the last event is the answer"
    return event


if __name__ == "__main__":
    main()
