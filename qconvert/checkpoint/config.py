"""config.json, read through transformers' own class and refused where an export would be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.file_state import MERGE
from qconvert.checkpoint.quantised.scheme import find_scheme
from qconvert.checkpoint.text_files import read_json_object
from qconvert.checkpoint.tokens import named_tokens
from qconvert.errors import QconvertError
from qconvert.models.families import FAMILIES, SUPPORTED, find_family, rope_tables, what_it_is
from qconvert.models.family import Family, head_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers computes these once, from the config alone, so a table of cosines can stand in a graph.
# Others (dynamic, longrope) change the frequencies with the length of the sequence.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# These keys say how a program ran the model, and are no properties of it: a kernel that is not installed here
# is no reason to refuse the checkpoint, and what a call returns is decided by the caller.
_NOT_THE_MODELS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("_attn_implementation_autoset", "experts_implementation", "_experts_implementation"),
    *("quantization_config", "compression_config"),  # read by quantised/scheme.py
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript"),
    *("use_cache", "tp_plan", "base_model_tp_plan", "base_model_pp_plan"),
)
# In these keys null means that nothing is given, while transformers would take it for a value.
_NULL_IS_ABSENT = ("head_dim", "tie_word_embeddings", "use_sliding_window")
ADAPTER = "adapter_config.json"
# Far above any model, and small enough that nothing is counted or laid out for hours.
_MOST_LAYERS = 1_000
_LARGEST = 2**31 - 1
_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' warnings and progress bars: what matters in them is checked and said by us."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def load_config(folder: Path) -> PreTrainedConfig:
    """The checkpoint's configuration, checked: an export covers everything in it.

    ``auto_map`` (remote code) is ignored: transformers' own class is used and nothing is executed.

    Raises:
        QconvertError: no folder, no or a malformed config.json, another architecture, a way to quantise that
            is not read, or a value that an export does not cover; the message names it.
    """
    if not folder.exists():
        raise QconvertError(
            f"There is no folder {folder}.",
            hint="give a checkpoint's folder, or a hub id such as Qwen/Qwen2.5-0.5B",
        )
    if not folder.is_dir():
        raise QconvertError(
            f"{folder} is a file, not a checkpoint's folder.", hint="give the folder it lies in"
        )
    path = folder / "config.json"
    state, raw = read_json_object(path)
    if state.status == "missing" and (folder / ADAPTER).is_file():
        base = (read_json_object(folder / ADAPTER)[1] or {}).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        raise QconvertError(
            f"This folder holds an adapter (LoRA){of} and not a model: it has no config.json.",
            where=folder / ADAPTER,
            hint=MERGE,
        )
    if raw is None:
        what = (
            "There is no config.json"
            if state.status == "missing"
            else f"config.json is unusable: {state.detail}"
        )
        hint = _where_else(folder) if state.status == "missing" else state.hint
        raise QconvertError(f"{what}.", where=path, hint=hint)

    family = _check_identity(raw, path)
    _check_before(raw, path)
    try:
        with quiet_transformers():
            config = family.transformers_class("Config").from_dict(_of_the_model(raw))
    except Exception as error:  # transformers has no error class of its own for a bad value
        reason = " ".join(str(error).split())
        raise QconvertError(f"transformers refuses this configuration: {reason}", where=path) from error
    _check_sizes(config, path)
    _check_attention(config, path)
    if family.windows:
        _check_windows(config, path)
    for problem in family.unsupported(config):
        _refuse(path, *problem)
    pad = config.pad_token_id
    if type(pad) is not int or not 0 <= pad < config.vocab_size:
        config.pad_token_id = None  # no effect on an export; transformers refuses to build such a model
    config._attn_implementation = "sdpa"
    return config


def _where_else(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"give the GGUF file that you want itself, such as {ggufs[0]}"
    return "give a checkpoint's folder as it comes from a hub"


def _of_the_model(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in raw.items()
        if key not in _NOT_THE_MODELS and not (value is None and key in _NULL_IS_ABSENT)
    }


def _check_identity(raw: dict[str, Any], path: Path) -> Family:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        _refuse(path, "architectures", architectures, "a list of names is needed")
    family = find_family(model_type, architectures)
    if family is None:
        names = architectures or ["(no architecture)"]
        found = f"{', '.join(map(str, names))}, model_type {model_type}"
        what = "another architecture" if model_type in FAMILIES else what_it_is(model_type)
        raise QconvertError(f"This checkpoint is {what}: {found}.", where=path, hint=SUPPORTED)
    find_scheme(path.parent)
    return family


def _check_before(raw: dict[str, Any], path: Path) -> None:
    """Refuse what would take transformers hours, or all memory."""
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int | float) and layers > _MOST_LAYERS:
        _refuse(path, "num_hidden_layers", layers, f"more than {_MOST_LAYERS:,} layers")


def _check_sizes(config: PreTrainedConfig, path: Path) -> None:
    for key in _COUNTS:
        value = getattr(config, key, None)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            _refuse(path, key, value, "a positive whole number is needed")
    if config.max_position_embeddings < 2:
        _refuse(path, "max_position_embeddings", 1, "a prompt and an answer need a context of two tokens")
    _check_number(config, "rms_norm_eps", path)
    if type(config.tie_word_embeddings) is not bool:
        _refuse(path, "tie_word_embeddings", config.tie_word_embeddings, "true or false is needed")
    named_tokens(config.eos_token_id, path)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    explicit = getattr(config, "head_dim", None)
    if explicit is None and config.hidden_size % heads:
        _refuse(path, "hidden_size", config.hidden_size, f"it does not divide into {heads} attention heads")
    if explicit is not None and (type(explicit) is not int or not 1 <= explicit <= _LARGEST):
        _refuse(path, "head_dim", explicit, "a positive whole number is needed")
    if heads % kv_heads:
        _refuse(path, "num_attention_heads", heads, f"it does not divide among {kv_heads} key/value heads")
    if head_size(config) % 2:
        _refuse(path, "head_dim", head_size(config), "rotary positions need an even head size")


def _check_number(values: Any, key: str, path: Path) -> None:
    value = getattr(values, key, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        _refuse(path, key, value, "a positive number is needed")


def _check_attention(config: PreTrainedConfig, path: Path) -> None:
    if getattr(config, "is_causal", True) is not True:
        _refuse(
            path, "is_causal", config.is_causal, "an embedding model that looks ahead is not a language model"
        )

    rope = config.rope_parameters
    rope_type = rope.get("rope_type") if isinstance(rope, dict) else None
    if rope_type not in STATIC_ROPE_TYPES:
        _refuse(path, "rope_type", rope_type, f"supported: {', '.join(STATIC_ROPE_TYPES)}")
    for key in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = rope.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            _refuse(path, f"rope_parameters.{key}", value, "a positive number is needed")

    _check_angles(config, path)


def _check_windows(config: PreTrainedConfig, path: Path) -> None:
    kinds = config.layer_types
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        _refuse(
            path, "layer_types", kinds, "one of full_attention and sliding_attention is needed for each layer"
        )
    window = config.sliding_window
    if "sliding_attention" in kinds and (not isinstance(window, int) or window < 1):
        _refuse(path, "sliding_window", window, "layer_types has sliding layers, which need a window length")


def _check_angles(config: PreTrainedConfig, path: Path) -> None:
    """Further values of rope_parameters are known to transformers' own functions alone."""
    try:
        with quiet_transformers():
            cos, sin = rope_tables(config, 2)
    except Exception as error:  # whatever arithmetic raises of a value that is no number
        reason = " ".join(str(error).split())
        raise QconvertError(f"transformers refuses this configuration: {reason}", where=path) from error
    if not all(math.isfinite(value) for table in (cos, sin) for value in table.flat):
        _refuse(path, "rope_parameters", config.rope_parameters, "its angles are not finite")


def _refuse(path: Path, key: str, value: object, why: str) -> None:
    raise QconvertError(f"{key} = {value!r} is not supported: {why}.", where=f"{path}, {key}", hint=SUPPORTED)
