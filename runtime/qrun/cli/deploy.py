"""``qrun deploy``: the server of ``qrun serve`` behind Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qrun.cli.options import opening_options, speculate_option, template_option
from qrun.cli.server_options import named, need_packages, server_options
from qrun.cli.terminal import note
from qrun.folder.manifest import read_manifest


@click.command(short_help="Answer over HTTP with several replicas, on Ray.")
@click.option(
    "--engine", required=True, metavar="[NAME=]PATH", help="A model folder, under the name that clients use."
)
@click.option("--replicas", type=click.IntRange(min=1), help="Models that answer. [default: 1]")
@click.option("--min-replicas", type=click.IntRange(min=1), help="Fewest replicas. [default: 1]")
@click.option(
    "--max-replicas",
    type=click.IntRange(min=1),
    help="Most replicas; their number then follows the requests.",
)
@click.option(
    "--target-ongoing-requests",
    type=click.FloatRange(min=0, min_open=True),
    help="Requests of a replica at which another one is started. [default: --slots]",
)
@click.option(
    "--by-session",
    is_flag=True,
    help="Requests with the same x-session-id header go to the same replica, which has kept their beginning. "
    "[default: to the less busy one of two]",
)
@click.option("--ray", default="auto", show_default=True, metavar="auto|ADDRESS", help="The Ray cluster.")
@click.option(
    "--ray-cpus",
    type=click.IntRange(min=1),
    help="CPUs of each replica, which are its threads. [default: as many as there are for each]",
)
@click.option("--print-config", is_flag=True, help="Print a file for `serve deploy`, and start nothing.")
@server_options
@speculate_option
@template_option
@opening_options
def deploy(
    *,
    engine: str,
    replicas: int | None,
    min_replicas: int | None,
    max_replicas: int | None,
    target_ongoing_requests: float | None,
    ray: str,
    print_config: bool,
    host: str,
    port: int,
    **options: Any,
) -> None:
    """Answer over HTTP with replicas on a Ray cluster, as `qrun serve` does alone (docs/scaling.md).

    Ctrl-C or SIGTERM ends it: running answers are completed. On a cluster that it starts Ray's usage
    statistics are off.
    """
    if max_replicas is None and (min_replicas or target_ongoing_requests):
        raise click.UsageError("--min-replicas and --target-ongoing-requests need --max-replicas.")
    if max_replicas is not None and replicas is not None:
        raise click.UsageError(
            "--replicas has no place beside --max-replicas; --min-replicas says the fewest."
        )
    if max_replicas is not None and (min_replicas or 1) > max_replicas:
        raise click.UsageError("--min-replicas is more than --max-replicas.")
    if options["prompt_piece"] % 64:
        raise click.UsageError(f"--prompt-piece {options['prompt_piece']} is no multiple of 64.")
    without = {
        "--device": options["device"] is not None,
        "--threads (--ray-cpus says it)": options["threads"],
        "--verbose": options["verbose"],
    }
    for name, given in without.items():
        if given:
            raise click.UsageError(f"{name} has no place in a deployment.")
    need_packages("ray", "starlette", "uvicorn", "prometheus_client", extra="cpu,ray")
    from qrun.serve.guard import read_host, read_origin
    from qrun.serve.keys import keys_for
    from qrun.serve.server import bind

    keys_for(host, options["api_key_file"], no_auth=options["no_auth"])
    for each in (host, *options["allowed_hosts"]):
        read_host(each)
    for each in options["cors_origins"]:
        read_origin(each)
    ((name, path),) = named((engine,)).items()
    read_manifest(path)
    scaling = None
    if max_replicas is not None:
        target = target_ongoing_requests or options["slots"]
        scaling = {
            "min_replicas": min_replicas or 1,
            "max_replicas": max_replicas,
            "target_ongoing_requests": target,
        }
    wishes = _wishes(name, path, host, options)
    wishes.update(replicas=replicas or 1, autoscaling=scaling)
    from qrun.scaling.deploying import config_file, deploy_on_ray

    if print_config:
        wishes["cpus"] = wishes["cpus"] or 1
        click.echo(config_file(wishes, port or 8000), nl=False)
        return
    # Ray's own proxy listens: a taken port is refused here, before a cluster is asked.
    with bind(host, port) as listening:
        port = listening.getsockname()[1]
    deploy_on_ray(wishes, port, ray, tell=note)


def _wishes(name: str, path: Path, host: str, options: dict[str, Any]) -> dict[str, Any]:
    """See ``replica.application``: plain values, which a configuration file can hold."""
    opening = {
        each: options[each] for each in ("prefill_graph", "cuda_graph", "chat_template", "check_hashes")
    }
    limits = {each: options[each] for each in ("max_tokens", "max_seconds")}
    file = options["api_key_file"]
    return {
        "path": str(path) if str(path).startswith("~") else str(path.absolute()),
        "name": name,
        "cpus": options["ray_cpus"],
        "opening": {each: value for each, value in opening.items() if value is not None},
        "speculate": options["speculate"],
        "literal": not options["control_tokens"],
        "engine": {
            **limits,
            "slots": options["slots"],
            "queue": options["queue"],
            "chunk": options["prompt_piece"],
            "prefix_bytes": options["prefix_cache_bytes"],
            "suffix_tokens": options["suffix_cache_tokens"],
        },
        "state": {
            **limits,
            "most_bytes": int(options["max_body_mb"] * 1e6),
            "log_text": options["log_text"],
        },
        "hosts": [host, *options["allowed_hosts"]],
        "origins": list(options["cors_origins"]),
        "api_key_file": None if file is None else str(file.absolute()),
        "no_auth": options["no_auth"],
        "by_session": options["by_session"],
        "drain_seconds": options["drain_seconds"],
    }
