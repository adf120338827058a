"""Whether the processor's 8-bit products are exact."""

from __future__ import annotations

import platform
from pathlib import Path

from qrun.errors import QrunError
from qrun.folder.manifest import Manifest

_CPUINFO = Path("/proc/cpuinfo")
_EXACT = {"avx512_vnni", "avx_vnni", "amx_int8"}


def check_integer_products(manifest: Manifest, *, prefill_graph: bool) -> None:
    """Refuse a folder whose integer products would be silently wrong on this processor.

    x86 without VNNI adds pairs of 8-bit products in 16 bits, which overflow (ONNX Runtime, "Quantize ONNX
    models", on U8S8). Where it is not known what the processor can do, nothing is refused.

    Raises:
        QrunError: there is such a product, and no VNNI.
    """
    recipe = manifest.recipe
    if not (recipe.integer_products or recipe.integer_prompts) or _products_are_exact():
        return
    if recipe.integer_products:
        raise QrunError(
            "this processor has no VNNI instructions: the model's 8-bit products would overflow in it",
            where=manifest.folder,
            hint="export the model with --precision int8 --block-size 64, or int4",
        )
    if prefill_graph and recipe.integer_prompts:
        raise QrunError(
            "this processor has no VNNI instructions: 8-bit products of the graph for prompts would overflow",
            where=manifest.folder,
            hint="use --no-prefill-graph: prompts then go through the graph that decodes",
        )


def _products_are_exact() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return True
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)
    return flags is None or bool(_EXACT.intersection(flags))
