"""The server of ``qrun serve`` as a deployment of Ray Serve: each replica has one model and one engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from qrun.engine import Engine
from qrun.folder.manifest import read_manifest, weight_bytes
from qrun.model import Model
from qrun.scaling.folders import Folder, ready
from qrun.serve.app import create_app
from qrun.serve.guard import read_host, read_origin
from qrun.serve.keys import keys_for
from qrun.serve.models import Models, Source
from qrun.serve.server import log_to_stderr
from qrun.serve.state import ServerState

NAME = "qrun"  # of the application and its only deployment
_AT_ONCE = 1000  # requests beside those that are answered or wait


@serve.ingress()
class Replica:
    """Opens the model when it starts; Ray Serve hands it requests, and cancels those of clients that leave.

    Args:
        folder, shelf: see ``folders.ready``; without a shelf the folder must lie on the node.
        wishes: see ``application``.
        keys: API keys.
    """

    def __init__(self, folder: Folder, shelf: Any, wishes: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        log_to_stderr()
        place, _ = ready(folder, shelf)
        manifest = read_manifest(place)
        engine = wishes["engine"]

        def opened() -> Engine:
            model = Model.open(place, threads=wishes["cpus"], **wishes["opening"])
            model.speculate, model.literal = wishes["speculate"], wishes["literal"]
            return Engine(model, **engine)

        weights = weight_bytes(place, manifest)
        source = Source(opened, manifest, engine["slots"], weights, engine["prefix_bytes"])
        self._state = ServerState(
            Models({wishes["name"]: source}),
            keys,
            tuple(read_host(each) for each in wishes["hosts"]),
            tuple(read_origin(each) for each in wishes["origins"]),
            **wishes["state"],
        )

    async def __serve_build_asgi_app__(self) -> Any:
        await self._state.models.open_all()
        return create_app(self._state)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises.

        Raises:
            RuntimeError: the thread that steps the model has ended.
        """
        for name, served in self._state.models.items():
            if served.engine is not None and not served.engine.alive:
                raise RuntimeError(f"the engine of {name} has ended")

    def __del__(self) -> None:
        if hasattr(self, "_state"):
            self._state.models.close()


def application(wishes: dict[str, Any], shelf: Any = None, folder: Folder | None = None) -> Any:
    """What Ray Serve runs. ``serve deploy`` calls it on the cluster, with what stands in the file.

    Args:
        wishes: "path" of the model folder, "name" that clients use, "cpus" of a replica, "opening" of the
            model, "speculate", "literal", "engine" and "state" for those classes, "hosts" (the first is the
            address), "origins", "api_key_file", "no_auth", and what ``deployment_of`` reads.
        shelf: gives the folder to nodes that have none.
        folder: as all nodes must have it; else it follows from "path" and "files".

    Raises:
        QrunError: no keys where they are needed.
    """
    file = wishes["api_key_file"]
    host = wishes["hosts"][0]
    keys = keys_for(host, None if file is None else Path(file).expanduser(), no_auth=wishes["no_auth"])
    deployment = serve.deployment(Replica, name=NAME).options(**deployment_of(wishes))
    return deployment.bind(folder or Folder(wishes["path"], wishes["files"]), shelf, wishes, keys)


def deployment_of(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the deployment, as Ray Serve's Python and its configuration files have them."""
    found = {
        "ray_actor_options": {"num_cpus": wishes["cpus"]},
        # Requests that wait do so in our own queue, which is fair among clients. Ray's has no end, and held
        # up those that our server answers at once: with 429 where its queue is full, /health, /metrics.
        "max_ongoing_requests": wishes["engine"]["slots"] + wishes["engine"]["queue"] + _AT_ONCE,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": wishes["drain_seconds"],
        "max_constructor_retry_count": 3,
    }
    if wishes["autoscaling"]:
        found["autoscaling_config"] = dict(wishes["autoscaling"])
    else:
        found["num_replicas"] = wishes["replicas"]
    if wishes["by_session"]:
        router = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
        found["request_router_config"] = {"request_router_class": router}
    return found
