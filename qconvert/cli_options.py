"""Options that several commands of qconvert have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

# Options that `qconvert export --engine` shares with `qconvert build`, which has more of them.
_BUILD_OPTIONS = (
    click.option(
        "--backend",
        type=click.Choice(["tensorrt", "rtx"]),
        help="By default whichever is installed and can build here.",
    ),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        multiple=True,
        help="Build with rtx for this kind of GPU, such as 8.9; may be given several times. Needs no GPU.",
    ),
    click.option(
        "--prompt-length",
        type=int,
        help="Most tokens of a prompt that are read at once.  [default: 1024, or the cache's length]",
    ),
)


def build_options(command: Any) -> Any:
    """The options of a build, on a command."""
    for option in reversed(_BUILD_OPTIONS):
        command = option(command)
    return command


def adapter_option(help_text: str) -> Callable[[Any], Any]:
    """``--adapter``, with what it means to a command."""
    return click.option("--adapter", "adapters", metavar="FOLDER[=WEIGHT]", multiple=True, help=help_text)
