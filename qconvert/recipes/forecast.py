"""What an export will cost, computed from the sizes alone: parameters, bytes on disk, bytes of KV cache."""

from __future__ import annotations

from qconvert.formats.recipe import BlockFormat, ChannelFormat, Recipe
from qconvert.models.decoder import DecoderSpec

_ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def parameter_count(spec: DecoderSpec) -> int:
    """Parameters of the checkpoint; a tied embedding counts once."""
    linear, biases, norms, embedding, heads = _shares(spec)
    return linear + biases + norms + embedding * heads


def export_bytes(spec: DecoderSpec, recipe: Recipe) -> int:
    """Bytes of the weights in the model folder under ``recipe``, RoPE tables included."""
    linear, biases, norms, embedding, heads = _shares(spec)
    item = _ITEM_SIZE[recipe.activations]
    rope = spec.context_length * spec.head_size  # cosines and sines of half a head
    total = (biases + norms + rope) * item
    total += _bytes(linear, recipe.linear, item)
    for part, fmt in recipe.exceptions.items():
        share = spec.num_hidden_layers * spec.hidden_size * _inputs(spec, part)
        total += _bytes(share, fmt, item) - _bytes(share, recipe.linear, item)
    if recipe.prefill is not None:
        total += _bytes(linear, recipe.prefill, item)
    total += _bytes(embedding, recipe.head, item) * heads
    return total


def kv_bytes_per_token(spec: DecoderSpec, dtype: str) -> int:
    """Bytes of keys and values of all layers for one token, kept in ``dtype``."""
    return 2 * spec.num_hidden_layers * spec.kv_size * _ITEM_SIZE[dtype]


def _shares(spec: DecoderSpec) -> tuple[int, int, int, int, int]:
    """Elements of all linear weights, biases, norms and one embedding; number of embeddings."""
    hidden = spec.hidden_size
    attention = hidden * (spec.query_size + 2 * spec.kv_size) + spec.query_size * hidden
    linear = spec.num_hidden_layers * (attention + 3 * hidden * spec.intermediate_size)
    biases = spec.num_hidden_layers * (spec.query_size + 2 * spec.kv_size)
    norms = (2 * spec.num_hidden_layers + 1) * hidden
    return linear, biases, norms, hidden * spec.vocab_size, 1 if spec.tie_word_embeddings else 2


def _inputs(spec: DecoderSpec, part: str) -> int:
    """What times ``hidden_size`` gives the elements of a kind of linear weight that recipes except."""
    return {"o_proj": spec.query_size, "down_proj": spec.intermediate_size}[part]


def _bytes(elements: int, fmt: BlockFormat | ChannelFormat | None, item: int) -> int:
    return elements * item if fmt is None else int(elements * fmt.bits_per_weight / 8)
