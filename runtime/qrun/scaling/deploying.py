"""A deployment from its start to Ctrl-C, and its configuration file."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from qrun.errors import QrunError
from qrun.scaling.cluster import first_line, join, refusal_in, refusal_of
from qrun.scaling.folders import folder_of
from qrun.scaling.placing import check_nodes, shelf_of
from qrun.scaling.proxy import variables

# For Ray Serve to end, beyond the seconds that running answers have.
_SECONDS_TO_END = 20.0
_SECONDS_BETWEEN_LOOKS = 1.0


def config_file(wishes: Mapping[str, Any], port: int) -> str:
    """A file for ``serve deploy``, as ``serve build`` writes them. API keys do not stand in it.

    The hashes of the model folder do: replicas that find another one on their node refuse to start.

    Raises:
        QrunError: there is no model folder here, or not a whole one.
    """
    import yaml

    from qrun.scaling.replica import NAME, deployment_of

    folder = folder_of(Path(wishes["path"]))
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": wishes["hosts"][0], "port": port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "qrun.scaling.replica:application",
                "args": {"wishes": {**wishes, "path": folder.path, "files": dict(folder.files)}},
                "deployments": [{"name": NAME, **deployment_of(wishes)}],
            }
        ],
    }
    return str(yaml.safe_dump(content, sort_keys=False))


def cpus_for(replicas: int, cpus: int | None, here: list[dict[str, Any]]) -> int:
    """CPUs of each replica: those that were asked for, else as many as there are for each.

    Raises:
        QrunError: so many replicas find no room.
    """
    sizes = [each["cpus"] for each in here]
    found = cpus or next(
        (each for each in range(max(sizes), 0, -1) if sum(size // each for size in sizes) >= replicas), 1
    )
    room = sum(size // found for size in sizes)
    if room < replicas:
        raise QrunError(
            f"the cluster has room for {room} replicas of {found} CPUs, and {replicas} are wanted",
            hint="give fewer --replicas or --ray-cpus, or add nodes",
        )
    return found


def deploy_on_ray(
    wishes: dict[str, Any],
    port: int,
    address: str,
    *,
    tell: Callable[[str], None],
) -> None:
    """Answer until Ctrl-C or SIGTERM, then take everything away that was started.

    Args:
        wishes: see ``replica.application``; "cpus" None is decided here.
        port: a free one; it is every node's.
        address: of the cluster, or "auto".
        tell: shows a line to the person.

    Raises:
        QrunError: the cluster, a node's folder, the room or the model is no good; Ray Serve runs there
            already, whose applications are left alone; or it does not end.
    """
    folder = folder_of(Path(wishes["path"]))
    try:
        join(address, variables())
        # Ray has taken this signal for itself.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _deploy(wishes, port, folder, tell)
    finally:
        import ray

        ray.shutdown()


def _deploy(wishes: dict[str, Any], port: int, folder: Any, tell: Callable[[str], None]) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from qrun.scaling.replica import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if serve.status().applications or serve.status().proxies:
        raise QrunError(
            "Ray Serve runs on this cluster already", hint="add to its file what --print-config prints"
        )
    shelf = shelf_of(folder)
    here = check_nodes(folder, shelf, tell, head=True)  # which has a proxy
    fewest = wishes["autoscaling"].get("min_replicas", 1) if wishes["autoscaling"] else wishes["replicas"]
    wishes["cpus"] = cpus_for(fewest, wishes["cpus"], here)
    host = wishes["hosts"][0]
    app = application(wishes, shelf, folder)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        tell(f"{fewest} replicas of {wishes['cpus']} CPUs, {len(here)} nodes")
        serve.run_many(
            [serve.RunTarget(app, name=NAME, route_prefix="/")], wait_for_applications_running=False
        )
        shown = f"[{host}]" if ":" in host else host
        with suppress(KeyboardInterrupt):
            _watch(tell, f"listening on http://{shown}:{port}")
        tell("closing")
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise refusal_of(error) or QrunError(f"Ray Serve could not deploy it: {first_line(error)}") from error
    finally:
        drain = wishes["drain_seconds"]
        _end(lambda: _take_down(drain), drain + _SECONDS_TO_END)


def _watch(tell: Callable[[str], None], listening: str) -> None:
    """Tell when all replicas answer and, once each, why one does not start while others answer.

    Raises:
        QrunError: none starts.
    """
    told: set[str] = set()
    while True:
        sleep(_SECONDS_BETWEEN_LOOKS)
        status, running, trouble = _state()
        refusal = refusal_in(trouble)
        if status == "DEPLOY_FAILED" and not running:
            last = trouble.strip().rpartition("\n")[2]
            raise refusal or QrunError(f"Ray Serve could not deploy it: {last}")
        lines = [listening] if status == "RUNNING" else []
        if refusal is not None and running:
            lines.append(f"a replica does not start: {refusal}")
        for line in lines:
            if line not in told:
                told.add(line)
                tell(line)


def _state() -> tuple[str, int, str]:
    """Ray Serve's word for how the application is, its running replicas, and what it says of the others."""
    from ray import serve

    from qrun.scaling.replica import NAME

    with suppress(Exception):  # the controller has died, or is being started again
        app = serve.status().applications[NAME]
        (deployment,) = app.deployments.values()
        return app.status.value, deployment.replica_states.get("RUNNING", 0), deployment.message
    return "", 0, ""


def _take_down(drain_seconds: float) -> None:
    """Delete the application, which lets running answers be completed, and then end Ray Serve.

    To end Ray Serve alone breaks them off: its proxies, through which they go, are the first to be killed.
    """
    from ray import serve

    from qrun.scaling.replica import NAME

    until = monotonic() + drain_seconds
    with suppress(Exception):  # of a controller that has died, or never lived: what is left is taken down
        serve.delete(NAME, _blocking=False)
        while NAME in serve.status().applications and monotonic() < until:
            sleep(0.1)
    serve.shutdown()


def _end(shutdown: Callable[[], None], seconds: float) -> None:
    """Take Ray Serve down. Its controller may have died, and Ray would ask for it without end.

    Raises:
        QrunError: it does not end.
    """
    ending = threading.Thread(target=shutdown, name="qrun-deploy-end", daemon=True)
    ending.start()
    ending.join(seconds)
    if ending.is_alive():
        raise QrunError(
            f"Ray Serve has not ended within {seconds:.0f} s",
            hint="on a cluster of your own `serve shutdown` ends it, or `ray stop` the cluster",
        )
