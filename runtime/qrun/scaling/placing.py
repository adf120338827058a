"""The model folder and our version, looked after on every node that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qrun import __version__
from qrun.errors import QrunError
from qrun.scaling.cluster import first_line, nodes, refusal_of
from qrun.scaling.folders import Folder, Shelf, checked


def shelf_of(folder: Folder) -> Any:
    """An actor on this node, which has the folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Shelf).options(
        num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=3
    )
    return actor.remote(folder)


def check_nodes(
    folder: Folder, shelf: Any, tell: Callable[[str], None], *, head: bool = False
) -> list[dict[str, Any]]:
    """Every node that computes, which has the folder and our version when this returns.

    Args:
        folder, shelf: see ``folders.ready``.
        tell: shows a line to the person.
        head: the cluster's head must have our version too, if it does not compute.

    Raises:
        QrunError: a node has another folder or another version, or none computes.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = [each for each in nodes() if each["cpus"]]
    if not here:
        raise QrunError("no node of the cluster has CPUs", hint="start one with `ray start --address HEAD`")
    task = ray.remote(checked)
    asked = [
        task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(each["id"], soft=False)
        ).remote(folder if each["cpus"] else None, shelf)
        for each in nodes()
        if each["cpus"] or (head and each["head"])
    ]
    try:
        found = ray.get(asked)
    except RayError as error:
        raise refusal_of(error) or QrunError(
            f"a node cannot work: {first_line(error)}",
            hint=f"every node needs qrun {__version__}: pip install 'qconvert[cpu,ray]'",
        ) from error
    for each in found:
        if each["version"] != __version__:
            raise QrunError(f"{each['address']} has qrun {each['version']}, and here it is {__version__}")
        if each["copied"]:
            tell(f"{each['address']}: the model folder was copied there")
    return here
