"""What every benchmark states beside its figures: machine, versions, date; and medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

_PACKAGES = (
    *("qconvert", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    *("onnxruntime-genai", "optimum", "optimum-onnx", "numpy"),
)
_VERSIONS_PROGRAM = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def conditions(pythons: dict[str, str]) -> dict[str, Any]:
    """Date, machine and the versions in each named Python interpreter's environment."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {name: _versions(python) for name, python in pythons.items()},
    }


def _machine() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), ""
    memory = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            model = value if key == "model name" else model
            flags = value if key == "flags" else flags
        memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    except OSError:
        pass  # not Linux: the rest still says something
    useful = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    return {
        "cpu": model,
        "extensions": [flag for flag in useful if flag in flags.split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
    }


def _versions(python: str) -> dict[str, str]:
    command = [python, "-c", _VERSIONS_PROGRAM, *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {"median": median(values), "least": min(values), "greatest": max(values), "runs": len(values)}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range: "12.3 (12.0 to 13.1)"."""
    text = f"{median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def conditions_text(facts: dict[str, Any]) -> str:
    """The conditions in a few lines of Markdown."""
    machine = facts["machine"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    lines = [
        f"{facts['date']}, {machine['cpu']} ({machine['cores']} cores, {' '.join(machine['extensions'])})"
        f"{memory}, {machine['system']}, load average {machine['load_average_at_start']} at the start."
    ]
    for name, versions in facts["versions"].items():
        lines.append(
            f"{name}: " + ", ".join(f"{package} {number}" for package, number in versions.items()) + "."
        )
    return "  \n".join(lines)


def publish(text: str, result: dict[str, Any], json_file: Path | None) -> None:
    """Print the Markdown, or with a file write the JSON there too ("-": JSON alone on stdout)."""
    if str(json_file) == "-":
        print(json.dumps(result, indent=2))
        return
    print(text)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2) + "\n")
