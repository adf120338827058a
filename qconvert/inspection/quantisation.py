"""What a checkpoint's quantisation is, field by field, and how many bits a weight it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from qconvert.checkpoint.computed import Computed
from qconvert.checkpoint.quantised.scheme import Scheme
from qconvert.inspection.facts import Fact

_SECTION = "quantisation"


def quantisation_facts(scheme: Scheme | None, computed: Mapping[str, Computed]) -> Iterator[Fact]:
    """What config.json says of it, then what the files hold.

    Args:
        scheme: of the checkpoint; None where each tensor says it for itself, as in a GGUF file.
        computed: its quantised tensors; none where the weights are not whole.
    """
    if scheme is not None:
        yield Fact(_SECTION, "quant_method", scheme.name, "how the weights were quantised")
        for field in scheme.fields:
            yield Fact(_SECTION, field.key, field.value, field.meaning)
    if not computed:
        return
    kinds: dict[str, list[Computed]] = {}
    for tensor in computed.values():
        kinds.setdefault(tensor.stored_as, []).append(tensor)
    for kind, tensors in kinds.items():
        weights = sum(prod(tensor.shape) for tensor in tensors)
        bits = 8 * sum(tensor.stored_bytes for tensor in tensors) / weights
        count = f"{len(tensors)} matrices, {weights / 1e6:,.1f} million weights"
        yield Fact(_SECTION, kind, round(bits, 3), f"bits a weight, scales and zero points included; {count}")
    kept = [tensor.kept for tensor in computed.values() if tensor.kept is not None]
    meaning = f"of {len(computed)} quantised matrices; an export stores the others dequantised"
    yield Fact(_SECTION, "codes that can be kept", len(kept), meaning)
    summed = sum(each.fmt.residuals for each in kept)
    if summed:
        meaning = "matrices whose blocks add a float32 to each weight, by a second small product"
        yield Fact(_SECTION, "with residuals", summed, meaning)
    orders = {each.order for each in kept if each.order is not None}
    if orders:
        yield Fact(_SECTION, "orders of inputs", len(orders), "each is a Gather in front of what reads it")
