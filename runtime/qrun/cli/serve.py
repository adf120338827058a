"""``qrun serve``: models behind an HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.backends.ledger import LEDGER
from qrun.cli.options import open_model, opening_options, speculate_option, template_option
from qrun.cli.server_options import named, need_packages, server_options
from qrun.cli.terminal import note, size
from qrun.decoding.prefix_files import check_folder
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes, names_plan, read_manifest, weight_bytes

if TYPE_CHECKING:
    from qrun.serve.models import Source


@click.command(short_help="Answer many programs at once over HTTP.")
@click.option(
    "--engine",
    "engines",
    required=True,
    multiple=True,
    metavar="[NAME=]PATH",
    help="A model folder, its .onnx or a .plan, under the name that clients use; may be repeated.",
)
@click.option(
    "--lazy",
    is_flag=True,
    help="Open a model when it is first asked for, and close the least recently used one where another needs "
    "its memory. [default: all at the start]",
)
@click.option(
    "--memory",
    "memory_gb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Memory that models and their caches may take together. [default: what the machine has]",
)
@click.option(
    "--prefix-cache-dir",
    type=click.Path(path_type=Path),
    help="Keep these beginnings here over a restart. [default: they are forgotten]",
)
@server_options
@speculate_option
@template_option
@opening_options
def serve(
    *,
    engines: tuple[str, ...],
    host: str,
    port: int,
    slots: int,
    queue: int,
    prompt_piece: int,
    lazy: bool,
    memory_gb: float | None,
    prefix_cache_bytes: int,
    prefix_cache_dir: Path | None,
    suffix_cache_tokens: int,
    api_key_file: Path | None,
    control_tokens: bool,
    no_auth: bool,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    max_body_mb: float,
    max_tokens: int | None,
    max_seconds: float | None,
    log_text: bool,
    drain_seconds: float,
    speculate: bool,
    **options: Any,
) -> None:
    """Answer many programs at once over HTTP, as OpenAI's API does (docs/serving.md).

    A model without a name has that of its folder. SIGTERM or Ctrl-C ends it: running answers are completed.
    """
    need_packages("starlette", "uvicorn", "prometheus_client", extra="serve")
    if prompt_piece % 64:
        raise click.UsageError(f"--prompt-piece {prompt_piece} is no multiple of 64.")
    if prefix_cache_dir is not None and not prefix_cache_bytes:
        raise click.UsageError("--prefix-cache-dir has nothing to keep: --prefix-cache-bytes is 0.")
    from qrun.serve.guard import read_host, read_origin
    from qrun.serve.keys import keys_for
    from qrun.serve.models import Models
    from qrun.serve.server import bind, log_to_stderr, run
    from qrun.serve.state import ServerState

    keys = keys_for(host, api_key_file, no_auth=no_auth)
    names = tuple(read_host(each) for each in (host, *allowed_hosts))
    origins = tuple(read_origin(each) for each in cors_origins)
    folders = named(engines)
    limit = None if memory_gb is None else int(memory_gb * 1e9)
    with bind(host, port) as listening:
        if prefix_cache_dir is not None:
            prefix_cache_dir = prefix_cache_dir.expanduser()
            check_folder(prefix_cache_dir)
        log_to_stderr()
        LEDGER.limit = limit

        limits: dict[str, Any] = {"max_tokens": max_tokens, "max_seconds": max_seconds}
        places = {"slots": slots, "prefix_bytes": prefix_cache_bytes}
        settings = {**limits, "queue": queue, "chunk": prompt_piece, "prefix_folder": prefix_cache_dir}
        settings["suffix_tokens"] = suffix_cache_tokens
        opening = {**options, "speculate": speculate}
        sources = {
            name: source_of(path, **places, settings=settings, opening=opening, literal=not control_tokens)
            for name, path in folders.items()
        }
        models = Models(sources, lazy=lazy)
        for name, served in models.items():
            _tell(name, served.source, limit)
        address = listening.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        keyed = "with API keys" if keys else "without API keys"

        def when_ready() -> None:
            note(f"listening on http://{shown}:{address[1]} ({keyed})")

        bounds = {**limits, "most_bytes": int(max_body_mb * 1e6)}
        state = ServerState(models, keys, names, origins, **bounds, log_text=log_text)
        run(state, listening, drain_seconds=drain_seconds, when_ready=when_ready)


def source_of(
    path: Path,
    *,
    slots: int,
    prefix_bytes: int,
    settings: Mapping[str, Any] | None = None,
    opening: Mapping[str, Any] | None = None,
    literal: bool = True,
) -> Source:
    """What the server knows of a model before it is opened, and how it will be.

    Args:
        path: a model folder, its .onnx or a .plan.
        slots: a plan has one, whose keys and values cannot be copied, and so keeps no beginnings of prompts.
        prefix_bytes: for beginnings of prompts.
        settings: more for ``Engine``.
        opening: more for ``open_model``.
        literal: whether special tokens in messages stay text.

    Raises:
        QrunError: there is no model folder.
    """
    from qrun.serve.models import Source

    manifest = read_manifest(path)
    plan = names_plan(path) or manifest.target != "onnxruntime"
    places: dict[str, Any] = {"slots": 1 if plan else slots, "prefix_bytes": 0 if plan else prefix_bytes}

    def opened() -> Engine:
        model = open_model(engine=path, **{"verbose": False, **(opening or {})})
        model.literal = literal
        return Engine(model, **places, **(settings or {}))

    return Source(opened, manifest, weight_bytes=weight_bytes(path, manifest), **places)


def _tell(name: str, source: Source, limit: int | None) -> None:
    """Memory of a model, before it is opened.

    Raises:
        QrunError: it alone needs more than all models may take.
    """
    manifest, context = source.manifest, source.manifest.model.context_length
    if limit is not None and source.first_bytes > limit:
        raise QrunError(
            f"{name} needs {size(source.first_bytes)}, and --memory is {size(limit)}",
            where=manifest.folder,
            hint="give more, or a smaller --prefix-cache-bytes or --slots",
        )
    note(
        f"{name}: {manifest.precision}, {size(source.weight_bytes)} of weights, {source.slots} slots of up "
        f"to {context:,} tokens ({size(forecast_bytes(manifest, context, source.slots))} if all are full), "
        f"{size(source.prefix_bytes)} for beginnings of prompts"
    )
