"""What a TensorRT plan is, what it costs, and whether this machine can run it; nothing is deserialised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qrun.backends.trt.checks import forecast_device_bytes, why_not_here
from qrun.cli.terminal import hashing, rows, size
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest
from qrun.folder.plan import TITLES, PlanFacts, Profile


def check_plan(facts: PlanFacts) -> None:
    """Hash the plan, with a progress bar.

    Raises:
        QrunError: its bytes are not those that were built.
    """
    with hashing(facts.plan_size) as progress:
        facts.check_bytes(progress)


def describe_plan(facts: PlanFacts, manifest: Manifest, *, hashes_checked: bool = False) -> dict[str, Any]:
    """The facts as one JSON object; sizes in bytes, lengths in tokens."""
    return {
        "plan": str(facts.path),
        "name": manifest.name,
        "precision": facts.precision,
        "backend": facts.backend,
        "library_version": facts.library_version,
        "compute_capabilities": list(facts.compute_capabilities),
        "version_compatible": facts.version_compatible,
        "hardware_compatible": facts.hardware_compatible,
        "stripped": facts.stripped,
        "profiles": [asdict(profile) for profile in facts.profiles],
        "cache_length": facts.cache_length,
        "kv_cache": {
            "dtype": manifest.kv.dtype,
            "bytes_per_token": manifest.kv.bytes_per_token,
            "bytes": forecast_device_bytes(facts, manifest)["kv_cache"],
        },
        "plan_bytes": facts.plan_size,
        "sha256": facts.plan_sha256,
        "hashes_checked": hashes_checked,
        "here": here(why_not_here(facts, manifest)),
    }


def plan_lines(info: dict[str, Any]) -> Iterator[str]:
    """The same for people, in 80 columns (paths may be longer)."""
    kv = info["kv_cache"]
    opens = "in this version or a later one" if info["version_compatible"] else "in this version only"
    gpus = ", ".join(info["compute_capabilities"])
    yield from rows(
        {
            "plan": Path(info["plan"]),
            "model": f"{info['name']}, precision {info['precision']}",
            "built with": f"{TITLES[info['backend']]} {info['library_version']}; opens {opens}",
            "runs on": f"GPUs of compute capability {gpus}"
            + (" and all from 8.0 on" if info["hardware_compatible"] else ""),
            "profiles": "; ".join(_profile(Profile(**profile)) for profile in info["profiles"]),
            "KV cache": f"{kv['dtype']}, {size(kv['bytes_per_token'])} per token, {size(kv['bytes'])} for "
            f"{info['cache_length']:,} tokens, allocated whole",
            "GPU memory": f"{size(info['plan_bytes'] + kv['bytes'])} and a workspace: plan "
            f"{size(info['plan_bytes'])}{' without weights' if info['stripped'] else ''}, KV cache "
            f"{size(kv['bytes'])}",
            "bytes": "hash checked" if info["hashes_checked"] else "size checked, hash not",
            **here_rows(info["here"]),
        }
    )


def here(refusal: QrunError | None) -> dict[str, Any]:
    """Whether this machine can run it, as JSON."""
    return {
        "runs": refusal is None,
        "why_not": refusal and refusal.what,
        "what_to_do": refusal and refusal.hint,
    }


def here_rows(facts: dict[str, Any], *, how: str = "") -> dict[str, str]:
    """The same as rows; ``how`` says how it would run."""
    if facts["runs"]:
        return {"here": f"can run{how}"}
    return {"here": f"cannot run: {facts['why_not']}", "what to do": facts["what_to_do"]}


def _profile(profile: Profile) -> str:
    if profile.most == 1:
        return f"{profile.name} 1 token"
    return f"{profile.name} {profile.least:,} to {profile.most:,} tokens, tuned for {profile.typical:,}"
