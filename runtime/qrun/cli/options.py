"""Options that the commands share, and what they mean for a model and its sampling."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from qrun.backends.opening import Device, Opening, open_session
from qrun.backends.session import Session
from qrun.cli.info import check
from qrun.cli.terminal import note, size, warn, working
from qrun.decoding.draft import Draft
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes, names_plan, read_manifest
from qrun.machine import available_memory
from qrun.model import Model
from qrun.sampling.params import SamplingParams, resolve, unsupported_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

Command = TypeVar("Command", bound=Callable[..., Any])
# Before version 8.4 click's ParamType cannot be subscripted at run time.
if TYPE_CHECKING:
    _CountsType = click.ParamType[tuple[int, ...]]
else:
    _CountsType = click.ParamType

_MODEL_OPTIONS = (
    click.option(
        "--engine",
        required=True,
        type=click.Path(path_type=Path),
        help="The model folder that `qconvert export` wrote, or the .onnx or .plan inside it.",
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda", "tensorrt"]),
        help="Where to run a folder; cuda and tensorrt need the GPU wheel of ONNX Runtime.  [default: cpu]",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all usable cores]"),
    click.option(
        "--prefill-graph/--no-prefill-graph",
        default=True,
        help="Read prompts with the folder's second graph, where it has one. [default: yes]",
    ),
    click.option(
        "--cuda-graph/--no-cuda-graph",
        default=True,
        help="Run a plan's decode step as one recorded CUDA graph. [default: yes]",
    ),
    click.option("--check-hashes", is_flag=True, help="Compare every file with its SHA-256 first."),
    click.option("-v", "--verbose", is_flag=True, help="Tell parameters, device and memory on stderr."),
)

_SAMPLING_OPTIONS = (
    click.option("--max-tokens", type=int, help="End of an answer, in tokens."),
    click.option("--greedy", is_flag=True, help="Always the most likely token."),
    click.option("--temperature", type=float, help="Divides the logits; 0 is greedy."),
    click.option("--top-k", type=int, help="Keep the k most likely tokens; 0 is off."),
    click.option("--top-p", type=float, help="Keep the most likely tokens of this total probability."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the most likely one."),
    click.option("--repetition-penalty", type=float, help="Above 1: fewer repetitions, the prompt counts."),
    click.option("--presence-penalty", type=float, help="Off each token that the answer holds, -2 to 2."),
    click.option("--frequency-penalty", type=float, help="The same for each occurrence, -2 to 2."),
    click.option("--seed", type=int, help="Makes the answer repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; may be repeated."),
)
_SAMPLING_NAMES = (
    "max_tokens",
    "greedy",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
)


class _Counts(_CountsType):
    """Whole numbers, separated by commas."""

    name = "N[,N...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, such as 128,512", param, ctx)


COUNTS = _Counts()


def model_options(command: Command) -> Command:
    """--engine and how to open it."""
    return _decorated(command, _MODEL_OPTIONS)


def opening_options(command: Command) -> Command:
    """How to open models, without --engine."""
    return _decorated(command, _MODEL_OPTIONS[1:])


def template_option(command: Command) -> Command:
    """--chat-template, for commands that render one."""
    return click.option(
        "--chat-template",
        metavar="NAME",
        help="Which of the model's chat templates, where it has several. [default: default]",
    )(command)


def thinking_option(command: Command) -> Command:
    """--thinking, for commands that render a chat template."""
    return click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Whether the model thinks before it answers, where its chat template can say so (Qwen3's can). "
        "[default: as the template says]",
    )(command)


def template_variables(thinking: bool | None) -> dict[str, Any]:
    """What --thinking means to a chat template."""
    return {} if thinking is None else {"enable_thinking": thinking}


def speculate_option(command: Command) -> Command:
    """--speculate, for commands that decode answers one after the other, or several at once."""
    return click.option(
        "--speculate/--no-speculate",
        default=False,
        help="Try several tokens in one step where the text repeats itself. [default: no]",
    )(command)


def draft_option(command: Command) -> Command:
    """--draft, for commands that decode one answer at a time."""
    return click.option(
        "--draft",
        type=click.Path(path_type=Path),
        help="A smaller model of the same tokenizer; what it guesses is tried several tokens in one step.",
    )(command)


def open_draft(draft: Path, *, engine: Path, verbose: bool = False, **options: Unpack[Opening]) -> Draft:
    """Open what --draft names, as the model itself is opened.

    Raises:
        QrunError: see ``Draft.open``.
    """
    given = {name: value for name, value in options.items() if value is not None}
    with working(f"opening {draft}"):
        found = Draft.open(draft, engine, **cast("Opening", given))
    if verbose:
        manifest = found.session.manifest
        context = f"context {manifest.model.context_length:,} tokens"
        note(f"draft: {manifest.name}, {manifest.precision}, {context}")
    return found


def sampling_options(command: Command) -> Command:
    """What the sampler may be asked; what is not given comes from the model's generation_config.json."""
    return _decorated(command, _SAMPLING_OPTIONS)


def _decorated(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Move the sampling options out of a command's options and make a request of them.

    Raises:
        click.UsageError: a value out of range, or two that contradict each other.
    """
    given = {name: options.pop(name) for name in _SAMPLING_NAMES}
    # "is not None", since 0 is a value.
    request = {name: value for name, value in given.items() if value is not None and value is not False}
    if not request["stop"]:
        del request["stop"]
    if request.pop("greedy", False):
        request["do_sample"] = False
    try:
        resolve(request)
    except QrunError as error:
        raise click.UsageError(_with_option_names(error.what, request)) from error
    return request


def _with_option_names(message: str, request: Mapping[str, Any]) -> str:
    for name in sorted(request, key=len, reverse=True):
        option = "--greedy" if name == "do_sample" else f"--{name.replace('_', '-')}"
        message = message.replace("do_sample=False" if name == "do_sample" else name, option)
    return message


def read_schema(path: Path, what: str = "the schema") -> Any:
    """The content of a JSON schema's file, or of another JSON file that is called ``what``.

    Raises:
        QrunError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QrunError(f"{what} cannot be read: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:
        raise QrunError(f"{what} is not JSON: {error}", where=path) from error


def open_engine(*, engine: Path, verbose: bool, **options: Unpack[Opening]) -> Session:
    """Open the session alone, for work that needs no text.

    Raises:
        QrunError: see ``open_session``.
    """
    with working(f"opening {engine}"):
        session = open_session(engine, **_opening(engine, options))
    if verbose:
        note(f"device: {session.device}")
    return session


def open_model(
    *,
    engine: Path,
    verbose: bool,
    chat_template: str | None = None,
    speculate: bool = False,
    draft: Path | None = None,
    **options: Unpack[Opening],
) -> Model:
    """Open what the model options name, and tell about it where that was asked.

    Raises:
        QrunError: see ``Model.open``.
    """
    opening = _opening(engine, options)
    with working(f"opening {engine}"):
        model = Model.open(engine, chat_template=chat_template, **opening)
    model.speculate = speculate
    for name, value in unsupported_settings(model.generation_config).items():
        warn(f"generation_config.json asks for {name}={value!r}, which qrun does not do")
    if edited := model.manifest.edited_files():
        note(f"edited since the export: {', '.join(edited)}")
    if verbose:
        tell_model(model)
    if draft is not None:
        model.draft = open_draft(draft, engine=engine, verbose=verbose, **options)
    return model


def _opening(engine: Path, options: Opening) -> Opening:
    """What was asked for. Hashes are checked here, where progress can be shown.

    Raises:
        QrunError: an option that has no meaning for a plan, or a file that is altered.
    """
    _check_place(engine, options.get("device"), options.get("threads"))
    if options.get("check_hashes"):
        check(read_manifest(engine), hashes=True)
    given = {name: value for name, value in options.items() if value is not None and name != "check_hashes"}
    return cast("Opening", given)


def _check_place(engine: Path, device: Device | None, threads: int | None) -> None:
    """Refuse --device and --threads for a plan, which runs on the GPU that it was built for in any case."""
    if names_plan(engine) and (device is not None or threads is not None):
        given = "--threads" if device is None else f"--device {device}"
        raise QrunError(
            f"{given} has no meaning for a plan: it runs on the GPU that it was built for",
            where=engine,
            hint=f"leave {given} out, or give the model folder: {engine.parent}",
        )


def tell_model(model: Model) -> None:
    """Device and memory, on stderr."""
    manifest = model.manifest
    note(f"device: {model.device}")
    full = forecast_bytes(manifest, manifest.model.context_length)
    gpu = getattr(model.session, "gpu", None)
    free = available_memory() if gpu is None else gpu.free_bytes()
    note(
        f"KV cache: {size(manifest.kv.bytes_per_token)} per token, {size(full)} at full context "
        f"({manifest.model.context_length:,} tokens)" + ("" if free is None else f", {size(free)} are free")
    )


def tell_sampling(params: SamplingParams, sources: Mapping[str, str]) -> None:
    """Every sampling parameter and where it came from, on stderr."""
    note("sampling:")
    for name, source in sources.items():
        note(f"  {name:<20}{getattr(params, name)!r:<16} {source}")
