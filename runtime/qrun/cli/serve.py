"""``qrun serve``: models behind an HTTP API."""

from __future__ import annotations

import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from qrun.cli.options import open_model, opening_options, template_option
from qrun.cli.terminal import note, size
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes, names_plan, read_manifest
from qrun.folder.paths import user_path

KEYS_VARIABLE = "QRUN_API_KEYS"


@click.command(short_help="Answer many programs at once over HTTP.")
@click.option(
    "--engine",
    "engines",
    required=True,
    multiple=True,
    metavar="[NAME=]PATH",
    help="A model folder, its .onnx or a .plan, under the name that clients use; may be repeated.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Answers at once for each model (1 for a plan).",
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Requests that may wait for a slot; others are told to come again.",
)
@click.option(
    "--prefix-cache-bytes",
    type=click.IntRange(min=0),
    default=512_000_000,
    show_default=True,
    help="Memory for beginnings of prompts that need not be read again, for each model; 0 keeps none.",
)
@click.option(
    "--prefix-cache-dir",
    type=click.Path(path_type=Path),
    help="Keep these beginnings here over a restart. [default: they are forgotten]",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"API keys, one a line. [default: those in {KEYS_VARIABLE}, separated by commas]",
)
@click.option(
    "--control-tokens",
    is_flag=True,
    help="Special tokens written out in a message (<|im_end|>) act as such. [default: they are text]",
)
@click.option("--no-auth", is_flag=True, help="Let everybody in, also from other machines.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name by which clients call it, beside localhost, addresses and --host; may be repeated.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Pages of this origin may ask it too, such as https://chat.example; may be repeated.",
)
@click.option(
    "--max-body-mb",
    type=click.FloatRange(min=0.001),
    default=8.0,
    show_default=True,
    help="Largest request.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Time that running answers have to end after SIGTERM.",
)
@template_option
@opening_options
def serve(
    *,
    engines: tuple[str, ...],
    host: str,
    port: int,
    slots: int,
    queue: int,
    prefix_cache_bytes: int,
    prefix_cache_dir: Path | None,
    api_key_file: Path | None,
    control_tokens: bool,
    no_auth: bool,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    max_body_mb: float,
    drain_seconds: float,
    **options: Any,
) -> None:
    """Answer many programs at once over HTTP, as OpenAI's API does (docs/serving.md).

    A model without a name has that of its folder. SIGTERM or Ctrl-C ends it: running answers are completed.
    """
    for package in ("starlette", "uvicorn", "msgspec", "prometheus_client"):
        if find_spec(package) is None:
            raise QrunError(f"{package} is not installed", hint="pip install 'qconvert[serve]'")
    if prefix_cache_dir is not None and not prefix_cache_bytes:
        raise click.UsageError("--prefix-cache-dir has nothing to keep: --prefix-cache-bytes is 0.")
    from qrun.serve.guard import read_host, read_origin
    from qrun.serve.server import bind, log_to_stderr, run
    from qrun.serve.state import ServerState

    keys = _read_keys(api_key_file)
    if not keys and not no_auth and not _is_loopback(host):
        raise QrunError(
            f"{host} can be reached from other machines, and there are no API keys",
            hint="give --api-key-file FILE, or --no-auth if everybody may ask",
        )
    names = tuple(read_host(each) for each in (host, *allowed_hosts))
    origins = tuple(read_origin(each) for each in cors_origins)
    named = _named(engines)
    with bind(host, port) as listening:
        log_to_stderr()
        opened: dict[str, Engine] = {}
        for name, path in named.items():
            model = open_model(engine=path, **options)
            model.literal = not control_tokens
            places = _places(path, slots, prefix_cache_bytes)
            opened[name] = Engine(model, **places, queue=queue, prefix_folder=prefix_cache_dir)
            facts = model.manifest.model
            most = forecast_bytes(model.manifest, facts.context_length, opened[name].slots)
            note(
                f"{name}: {model.manifest.precision}, {model.device}, {opened[name].slots} slots of up to "
                f"{facts.context_length:,} tokens ({size(most)} if all are full)"
            )
        address = listening.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        note(f"listening on http://{shown}:{address[1]} ({'with API keys' if keys else 'without API keys'})")
        state = ServerState(opened, keys, names, origins, most_bytes=int(max_body_mb * 1e6))
        run(state, listening, drain_seconds=drain_seconds)


def _places(path: Path, slots: int, prefix_bytes: int) -> dict[str, int]:
    """Slots and prefix cache of a model: a plan has one slot, whose keys and values cannot be copied."""
    plan = names_plan(path) or read_manifest(path).target != "onnxruntime"
    return {"slots": 1, "prefix_bytes": 0} if plan else {"slots": slots, "prefix_bytes": prefix_bytes}


def _named(engines: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for each in engines:
        name, equals, path = each.partition("=")
        if not equals or "/" in name:  # a path may hold an equals sign
            path = each
            whole = user_path(path)
            name = (whole.parent if whole.suffix in (".onnx", ".plan") else whole).resolve().name
        if not name or not path:
            raise QrunError(f"--engine {each} names nothing", hint="give PATH, or NAME=PATH")
        if name in found:
            raise QrunError(f"two models are called {name}", hint="give them names: --engine NAME=PATH")
        found[name] = Path(path)
    return found


def _read_keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    else:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if file is not None and not keys:
        raise QrunError("the file holds no API key", where=file, hint="write one key on each line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
