"""What a model costs wherever it runs, computed from its sizes alone: parameters, bytes of KV cache.

The bytes of an export's weights are those that its lowering asks for: ``lowering/forecast.py``.
"""

from __future__ import annotations

from math import prod

from qconvert.models.recorder import expected_tensors
from qconvert.models.spec import DecoderSpec

_ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def parameter_count(spec: DecoderSpec) -> int:
    """Parameters of the checkpoint; a tied embedding counts once."""
    return sum(prod(shape) for shape in expected_tensors(spec).values())


def kv_bytes_per_token(spec: DecoderSpec, dtype: str) -> int:
    """Bytes of keys and values of all layers for one token, kept in ``dtype``."""
    return 2 * spec.num_hidden_layers * spec.kv_size * _ITEM_SIZE[dtype]
