"""Our variants in one place: the class of bits each competes in, and what `qconvert export` is told."""

from __future__ import annotations

VARIANTS: dict[str, tuple[int, list[str]]] = {
    "int4": (4, ["--precision", "int4"]),
    "int4-prefill8": (4, ["--precision", "int4", "--prefill", "int8"]),
    "int4-prefill8-kv8": (4, ["--precision", "int4", "--prefill", "int8", "--kv-cache", "int8"]),
    "int4-balanced": (4, ["--quality", "balanced"]),
    "int4-balanced-prefill8-kv8": (
        4,
        ["--quality", "balanced", "--prefill", "int8", "--kv-cache", "int8"],
    ),
    "int4-rtn": (4, ["--precision", "int4", "--recipe", "rtn"]),
    "int4-gptq": (4, ["--precision", "int4", "--recipe", "gptq"]),
    "int4-gptq-mixed": (4, ["--precision", "int4", "--recipe", "gptq-mixed"]),
    "int8": (8, ["--precision", "int8"]),
    "int8-prefill8-kv8": (8, ["--precision", "int8", "--prefill", "int8", "--kv-cache", "int8"]),
}
# GPTQ takes long, and random weights have no use for it; rtn has the speed of int4: exported from the sample
# model alone, unless they are named (--peers all qconvert:int4-gptq).
QUALITY_ONLY = frozenset({"int4-gptq", "int4-gptq-mixed", "int4-rtn"})
