"""Our variants in one place: the class of bits each competes in, and what `qconvert export` is told."""

from __future__ import annotations

VARIANTS: dict[str, tuple[int, list[str]]] = {
    "int4": (4, ["--precision", "int4"]),
    "int4-prefill8": (4, ["--precision", "int4", "--prefill", "int8"]),
    "int8": (8, ["--precision", "int8"]),
}
