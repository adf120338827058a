"""adapter_config.json of a LoRA adapter: what it changes, and by how much."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.checkpoint.text_files import read_json_object
from qconvert.errors import QconvertError

CONFIG = "adapter_config.json"
MERGE_YOURSELF = "merge it with peft: model.merge_and_unload().save_pretrained(NEW_FOLDER)"
_ALL_LINEAR = "all-linear"
# Beginnings that leave the model's weights alone. Others (pissa, olora, loftq, corda, lora_ga) change them.
_HARMLESS_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
# How it was trained, and by what.
_HOW = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_config"),
    *("megatron_core", "peft_version", "revision", "loftq_config", "eva_config", "qalora_group_size"),
    *("runtime_config", "enable_lora", "merge_weights", "lora_ga_config", "corda_config"),
)
# Fields that have to be as usual, and why.
_USUAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "LoRA alone is merged"),
    "task_type": ((None, "CAUSAL_LM"), "it is for another task than generating text"),
    "use_dora": ((None, False), "DoRA scales whole columns as well"),
    "use_qalora": ((None, False), "QALoRA pools its inputs"),
    "use_bdlora": ((None, False), "its matrices are in blocks"),
    "fan_in_fan_out": ((None, False), "the model's matrices are stored the other way round"),
    "lora_bias": ((None, False), "biases inside of LoRA are not merged"),
    "layer_replication": ((None,), "it doubles layers"),
    "target_parameters": ((None, []), "it changes parameters that are no layers"),
    "trainable_token_indices": ((None,), "it changes single rows of the embedding"),
    "alora_invocation_tokens": ((None,), "it works from certain tokens on only, which no merged weight does"),
    "ensure_weight_tying": ((None, False), "it ties what it has trained to other tensors"),
}


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter's configuration says, as far as it decides about weights."""

    rank: int
    alpha: float
    root: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    bias: str
    trained_on: str | None

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank of a module's matrices, and the factor of their product."""
        rank = self.ranks.get(_key(self.ranks, module), self.rank)
        alpha = self.alphas.get(_key(self.alphas, module), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.root else rank)

    def targeted(self, module: str, linear: bool) -> bool:
        """Whether it changes a module, by its name: peft's ``check_target_module_exists``."""
        if self.excluded and _named(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == _ALL_LINEAR:
            return linear and module != "lm_head"
        if not _named(self.targets, module):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [
            r".*?\.[^.]*\.(\d+)\."
        ]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """An expression for the whole name, or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that means a module: peft's ``get_pattern_key``."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_settings(folder: Path) -> AdapterSettings:
    """The configuration in an adapter's folder.

    Raises:
        QconvertError: no such file, or a field that is not understood; the message names it.
    """
    path = folder / CONFIG
    state, raw = read_json_object(path)
    if raw is None:
        what = (
            f"There is no {CONFIG}" if state.status == "missing" else f"{CONFIG} is unusable: {state.detail}"
        )
        raise QconvertError(
            f"{what}.", where=path, hint="give the folder that peft's save_pretrained has made"
        )
    left = dict(raw)

    def refuse(key: str, value: object, why: str) -> QconvertError:
        return QconvertError(
            f"an adapter with {key} = {value!r} is not merged: {why}.",
            where=f"{path}, {key}",
            hint=MERGE_YOURSELF,
        )

    for key, (usual, why) in _USUAL.items():
        if (value := left.pop(key, usual[0])) not in usual:
            raise refuse(key, value, why)
    beginning = left.pop("init_lora_weights", True)
    if beginning not in _HARMLESS_BEGINNINGS:
        raise refuse(
            "init_lora_weights", beginning, "it has changed the weights of its model before training"
        )

    def take(key: str, usual: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = left.pop(key, None)
        value = usual if value is None else value
        if not fits(value):
            raise refuse(key, value, f"{wanted} is needed")
        return value

    settings = AdapterSettings(
        rank=take("r", None, _count, "a positive whole number"),
        alpha=take("lora_alpha", None, _number, "a number"),
        root=take("use_rslora", False, lambda value: type(value) is bool, "true or false"),
        ranks=take("rank_pattern", {}, lambda value: _patterns(value, _count), "patterns with ranks"),
        alphas=take("alpha_pattern", {}, lambda value: _patterns(value, _number), "patterns with numbers"),
        targets=_names(take("target_modules", [], _is_names, "a list of names or an expression")),
        excluded=_names(take("exclude_modules", [], _is_names, "a list of names or an expression")),
        layers=_layers(take("layers_to_transform", None, _is_layers, "numbers of layers")),
        layers_pattern=_as_list(take("layers_pattern", [], _are_expressions, "names of lists of layers")),
        saved=_as_list(take("modules_to_save", [], _are_expressions, "a list of names")),
        bias=take(
            "bias", "none", lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"
        ),
        trained_on=base if isinstance(base := raw.get("base_model_name_or_path"), str) and base else None,
    )
    for key, value in left.items():
        if key not in _HOW and value not in (None, False, {}, [], ""):
            raise refuse(key, value, "this field is not known, and could change the weights")
    return settings


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _patterns(value: Any, fits: Any) -> bool:
    return isinstance(value, dict) and all(_is_expression(key) and fits(each) for key, each in value.items())


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return _is_expression(value)
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_expressions(value: Any) -> bool:
    """Whether each of them can be part of an expression, which is what peft makes of them."""
    return _is_names(value) and all(_is_expression(name) for name in _as_list(value))


def _names(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _as_list(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _is_layers(value: Any) -> bool:
    return (
        value is None
        or type(value) is int
        or (isinstance(value, list) and all(type(x) is int for x in value))
    )


def _layers(value: int | list[int] | None) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    return (value,) if isinstance(value, int) else tuple(value)
