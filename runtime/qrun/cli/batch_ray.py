"""``qrun batch --ray``: the same job on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qrun.cli.terminal import note

if TYPE_CHECKING:
    from qrun.batch.order import Order

Command = TypeVar("Command", bound=Callable[..., Any])


def ray_options(command: Command) -> Command:
    """--ray and what belongs to it."""
    for option in (
        click.option(
            "--ray-cpus",
            type=click.IntRange(min=1),
            help="CPUs of each worker. [default: those of the smallest node less one]",
        ),
        click.option(
            "--ray-workers",
            type=click.IntRange(min=1),
            help="Most workers. [default: as many as there is room for]",
        ),
        click.option(
            "--ray",
            metavar="auto|ADDRESS",
            help="Answer on a Ray cluster: docs/scaling.md. INPUT may be a pattern or an address.",
        ),
    ):
        command = option(command)
    return command


def take_ray(options: dict[str, Any]) -> dict[str, Any]:
    """Move these options out of a command's options: "address", "workers", "cpus".

    Raises:
        click.UsageError: one of them without --ray.
    """
    names = {"address": "ray", "workers": "ray_workers", "cpus": "ray_cpus"}
    found = {key: options.pop(name) for key, name in names.items()}
    if found["address"] is None and (found["workers"] or found["cpus"]):
        raise click.UsageError("--ray-workers and --ray-cpus need --ray.")
    return found


def run_with_ray(
    order: Order,
    places: tuple[str, str],
    ray: Mapping[str, Any],
    options: Mapping[str, Any],
    templated: bool | None,
    *,
    literal: bool,
) -> dict[str, Any]:
    """Do the job; returns its summary.

    Args:
        order: what is wanted.
        places: input and output as they were typed: an address is no path.
        ray: see ``take_ray``.
        options: of the model.
        templated: whether prompts are turns of a chat; None for what the model has.
        literal: whether special tokens in prompts stay text.

    Raises:
        click.UsageError: an option that has no meaning on a cluster.
        QrunError: see ``run_on_ray``.
    """
    without = {
        "--unordered (it always is)": order.unordered,
        "--force": order.force,
        "--max-errors": order.max_errors is not None,
        "--device": options["device"] is not None,
        "--threads (--ray-cpus says it)": options["threads"] is not None,
        "INPUT from a pipe": order.pipe is not None,
    }
    for name, given in without.items():
        if given:
            raise click.UsageError(f"{name} has no place with --ray.")
    from qrun.folder.manifest import find_model_folder
    from qrun.model import folder_template
    from qrun.scaling.running import Cluster, run_on_ray

    engine = options["engine"]
    if templated is None and folder_template(find_model_folder(engine.expanduser())) is None:
        order = replace(order, wanted=replace(order.wanted, chat=False))
    names = ("prefill_graph", "cuda_graph", "chat_template")
    opening = {name: options[name] for name in names if options[name] is not None}
    cluster = Cluster(ray["address"], ray["workers"], ray["cpus"])
    return run_on_ray(order, engine, cluster, places=places, opening=opening, literal=literal, tell=note)
