"""A checkpoint's own codes: where a target has a place for them, and what is told where it has none."""

from __future__ import annotations

from collections.abc import Mapping

from qconvert.formats.columns import BLOCK_SIZES as COLUMN_BLOCK_SIZES
from qconvert.formats.recipe import Kept, Recipe
from qconvert.formats.stored import VOCABULARY
from qconvert.recipes.precisions import Capabilities


def keepable(target: Capabilities, held: Mapping[str, Kept]) -> dict[str, Kept]:
    """Those matrices in codes that a target has a place for.

    Args:
        target: what it can run.
        held: by their names in the checkpoint, those that ONNX Runtime's blocks can hold.
    """
    if not target.packed_columns:
        return dict(held)
    return {name: kept for name, kept in held.items() if _in_columns(kept) and name not in VOCABULARY}


def _in_columns(kept: Kept) -> bool:
    """Whether TensorRT takes such a matrix."""
    fmt = kept.fmt
    return kept.order is None and fmt.symmetric and fmt.bits == 4 and fmt.block_size in COLUMN_BLOCK_SIZES


def about_codes(stored_as: Mapping[str, str], recipe: Recipe) -> tuple[str, ...]:
    """What a user is told of a quantised checkpoint's weights before the work.

    Args:
        stored_as: how the checkpoint holds each of its quantised tensors, by their names.
        recipe: what becomes of them.
    """
    if not stored_as:
        return ()
    if not recipe.kept:
        return (f"the checkpoint's weights are quantised already ({_kinds(stored_as)}): {_again(recipe)}",)
    notes = [f"{len(recipe.kept)} matrices keep the checkpoint's own codes ({_kinds(stored_as)})"]
    summed = [kept for kept in recipe.kept.values() if kept.fmt.residuals]
    if summed:
        notes.append(
            f"{len(summed)} of them have smallest values that are no whole multiples of their scales: what "
            "zero points leave over is stored in float32, and added by a second small product"
        )
    lost = {name: kind for name, kind in stored_as.items() if name not in recipe.kept}
    if recipe.head is not None:
        rounded = {name: lost.pop(name) for name in VOCABULARY if name in lost}
        of = f" ({_kinds(rounded)})" if rounded else ""
        notes.append(f"embedding and head are rounded to {recipe.head.bits} bits{of}")
    if lost:
        first = next(iter(lost))
        notes.append(
            f"{len(lost)} quantised matrices have no place as they are ({_kinds(lost)}; {first}): they are "
            f"exported dequantised, in {recipe.activations}"
        )
    types = {kept.fmt.scale_dtype for kept in recipe.kept.values()}
    if recipe.activations == "bfloat16" and types != {"bfloat16"}:
        notes.append("their scales are rounded to bfloat16, by less than one part in 256")
    if recipe.prefill is not None:
        notes.append("the graph for prompts rounds them a second time, to 8 bits")
    return tuple(notes)


def _again(recipe: Recipe) -> str:
    if recipe.precision == "fp32":
        return "they are dequantised, and nothing is rounded"
    if recipe.linear is None:
        return f"they are dequantised, and rounded to {recipe.activations}"
    return (
        f"they are dequantised, and rounded a second time to {recipe.precision}; --precision fp32 does not "
        "round them"
    )


def _kinds(stored_as: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(stored_as.values())))
