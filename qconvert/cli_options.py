"""Options that several commands of qconvert have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from qconvert.recipes.choose import QUALITIES

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


quality_option = click.option(
    "--quality",
    type=click.Choice(list(QUALITIES)),
    help="A precision and a recipe by how exact they are, for --target onnxruntime: fast is "
    "--precision int4, balanced --precision int4 --recipe awq-mixed, best --precision int8.",
)


def of_quality(quality: str | None, other_target: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for which ``--quality`` stands.

    Raises:
        UsageError: it contradicts another option.
    """
    if quality is None:
        return {}
    given = [name for name in ("precision", "recipe") if options[name] is not None]
    if given or other_target:
        other = f"--{given[0]}" if given else "TensorRT"
        raise click.UsageError(
            f"--quality chooses for --target onnxruntime, and not together with {other}: "
            "leave it out, or use --precision and --recipe alone."
        )
    precision, recipe = QUALITIES[quality]
    return {"precision": precision, "recipe": recipe}


def adapter_option(help_text: str) -> Callable[[Any], Any]:
    """``--adapter``, with what it means to a command."""
    return click.option("--adapter", "adapters", metavar="FOLDER[=WEIGHT]", multiple=True, help=help_text)
