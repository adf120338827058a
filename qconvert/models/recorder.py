"""Which tensors a decoder asks for, found by lowering it to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qconvert.models.decoder import DecoderSpec, lower_decoder

LowerDecoder = Callable[[DecoderSpec, Any], None]


def tensor_groups(spec: DecoderSpec, lower: LowerDecoder = lower_decoder) -> list[tuple[str, ...]]:
    """Every tensor that the decoder uses, those that are multiplied side by side together."""
    recorder = _Recorder()
    lower(spec, recorder)
    return list(dict.fromkeys(recorder.groups))


class _Recorder:
    """A lowering to nothing, which notes the tensors that the decoder asks for."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, ...]] = []

    def embed(self, weight: str) -> None:
        self.groups.append((weight,))

    def add_and_norm(self, residual: None, delta: None, weight: str) -> tuple[None, None]:
        self.groups.append((weight,))
        return None, None

    def linear(self, hidden: None, weights: Sequence[str], biases: Sequence[str] = ()) -> None:
        self.groups += [tuple(weights), *([tuple(biases)] if biases else [])]

    def attention(self, qkv: None, layer: int) -> None: ...

    def gated_silu(self, gate: None, up: None) -> None: ...

    def requested_positions(self, hidden: None) -> None: ...

    def head(self, hidden: None, weight: str) -> None:
        self.groups.append((weight,))
