"""Options of whatever answers over HTTP: ``qrun serve`` and ``qrun deploy``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from qrun.decoding.speculation import SUFFIX_TOKENS
from qrun.errors import QrunError
from qrun.folder.paths import user_path
from qrun.serve.keys import VARIABLE

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8080,
        show_default=True,
        help="Port to listen on; 0 takes a free one.",
    ),
    click.option(
        "--slots",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        help="Answers at once for each model (1 for a plan).",
    ),
    click.option(
        "--queue",
        type=click.IntRange(min=0),
        default=64,
        show_default=True,
        help="Requests that may wait for a slot; others are told to come again.",
    ),
    click.option(
        "--prompt-piece",
        type=click.IntRange(min=64),
        default=128,
        show_default=True,
        help="Tokens of a prompt that are read between two tokens of the other answers; a multiple of 64. "
        "A prompt of up to twice as many is read at once.",
    ),
    click.option(
        "--prefix-cache-bytes",
        type=click.IntRange(min=0),
        default=512_000_000,
        show_default=True,
        help="Memory for beginnings of prompts that need not be read again, for each model; 0 keeps none.",
    ),
    click.option(
        "--suffix-cache-tokens",
        type=click.IntRange(min=0),
        default=SUFFIX_TOKENS,
        show_default=True,
        help="With --speculate: tokens of ended requests' prompts and answers from which guesses for others "
        "are taken, for each model, in memory only; 0 keeps none.",
    ),
    click.option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        help=f"API keys, one a line. [default: those in {VARIABLE}, separated by commas]",
    ),
    click.option(
        "--control-tokens",
        is_flag=True,
        help="Special tokens written out in a message (<|im_end|>) act as such. [default: they are text]",
    ),
    click.option("--no-auth", is_flag=True, help="Let everybody in, also from other machines."),
    click.option(
        "--allowed-host",
        "allowed_hosts",
        multiple=True,
        metavar="NAME",
        help="A name by which clients call it, beside localhost, addresses and --host; may be repeated.",
    ),
    click.option(
        "--cors-origin",
        "cors_origins",
        multiple=True,
        metavar="ORIGIN",
        help="Pages of this origin may ask it too, such as https://chat.example; may be repeated.",
    ),
    click.option(
        "--max-body-mb",
        type=click.FloatRange(min=0.001),
        default=8.0,
        show_default=True,
        help="Largest request.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help="Most tokens of an answer; to ask for more is refused. [default: what the context has room for]",
    ),
    click.option(
        "--max-seconds",
        type=click.FloatRange(min=0, min_open=True),
        help="Time of a request, with waiting and reading; then its answer ends where it is. "
        "[default: no limit]",
    ),
    click.option("--log-text", is_flag=True, help="Prompts and answers in the log too. [default: never]"),
    click.option(
        "--drain-seconds",
        type=click.FloatRange(min=0),
        default=30.0,
        show_default=True,
        help="Time that running answers have to end after SIGTERM.",
    ),
)


def server_options(command: Command) -> Command:
    """Address, slots, limits, and who may ask."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def need_packages(*packages: str, extra: str) -> None:
    """Refuse to go on without these.

    Raises:
        QrunError: one of them is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise QrunError(f"{package} is not installed", hint=f"pip install 'qconvert[{extra}]'")


def named(engines: tuple[str, ...]) -> dict[str, Path]:
    """Models by the names that clients use: [NAME=]PATH.

    Raises:
        QrunError: no name or no path, or two of the same name.
    """
    found: dict[str, Path] = {}
    for each in engines:
        name, equals, path = each.partition("=")
        if not equals or "/" in name:  # a path may hold an equals sign
            path = each
            whole = user_path(path)
            folder = whole.parent if whole.suffix in (".onnx", ".plan") else whole
            # A link's own name, and not that of what it leads to.
            name = folder.resolve().name if folder.name in ("", "..") else folder.name
        if not name or not path:
            raise QrunError(f"--engine {each} names nothing", hint="give PATH, or NAME=PATH")
        if name in found:
            raise QrunError(f"two models are called {name}", hint="give them names: --engine NAME=PATH")
        found[name] = Path(path)
    return found
