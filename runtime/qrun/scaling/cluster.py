"""A Ray cluster, joined with its telemetry off."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from qrun.errors import QrunError

TELEMETRY = "RAY_USAGE_STATS_ENABLED"
_SECONDS = 10  # for a node to take a connection


def join(address: str, variables: Mapping[str, str] | None = None) -> None:
    """Connect to a cluster, or start one on this machine where ``auto`` finds none.

    Args:
        address: HOST:PORT, or "auto".
        variables: of the environment of each process that works for this one there.

    Ray sends reports of its use to its makers unless it is told not to. A cluster that is started here is
    told; one that somebody else has started does as they said.

    Raises:
        QrunError: ray is not installed, or nobody answers at the address.
    """
    if find_spec("ray") is None:
        raise QrunError("ray is not installed", hint="pip install 'qconvert[cpu,ray]'")
    os.environ.setdefault(TELEMETRY, "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning at every start
    import ray

    if ray.is_initialized():
        return
    try:
        _connect(address)
        ray.init(
            address=None if address == "auto" else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": dict(variables)} if variables else None,
        )
    except (ConnectionError, ValueError, OSError) as error:
        raise QrunError(
            f"no Ray cluster answers at {address}: {first_line(error)}",
            hint="start one with `ray start --head`, or give --ray auto for one on this machine",
        ) from error


def _connect(address: str) -> None:
    """See whether anything listens at HOST:PORT: Ray itself asks for minutes before it gives up.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS):
            pass


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive: "id", "address", "cpus", and whether it is the cluster's "head"."""
    import ray

    return [
        {
            "id": each["NodeID"],
            "address": each["NodeManagerAddress"],
            "cpus": int(each["Resources"].get("CPU", 0)),
            "head": "node:__internal_head__" in each["Resources"],
        }
        for each in ray.nodes()
        if each["Alive"]
    ]


def refusal_of(error: BaseException) -> QrunError | None:
    """The refusal of ours that lies in an error of Ray's, which wraps whatever a worker raises."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, QrunError):
            return seen
        inner = getattr(seen, "cause", None)
        if isinstance(inner, QrunError):
            return inner
        seen = seen.__cause__ or seen.__context__
    return None


def refusal_in(text: str) -> QrunError | None:
    """The last refusal of ours in a text of Ray's, such as a replica's traceback."""
    _, found, told = text.rpartition(f"{QrunError.__module__}.{QrunError.__qualname__}: ")
    if not found:
        return None
    what, *more = told.splitlines()
    parts = {name: value for name, _, value in (line.strip().partition(": ") for line in more)}
    return QrunError(what, where=parts.get("where"), hint=parts.get("what to do"))


def first_line(error: BaseException) -> str:
    """An error's first line, for a message of ours."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
