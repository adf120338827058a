"""Kinds in the small files beside the graphs, which change answers as much as a weight does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.qconvert.mutants import reseal
from tests.qconvert.planted.edits import DoesNotApplyError, Plant, in_json, in_text


def put(*keys: str, value: Any) -> Any:
    """A change of one value in an object of objects, which must have it."""

    def change(found: dict[str, Any]) -> None:
        for key in keys[:-1]:
            found = found[key]
        if keys[-1] not in found:
            raise DoesNotApplyError
        found[keys[-1]] = value(found[keys[-1]]) if callable(value) else value

    return change


def in_manifest(*keys: str, value: Any) -> Plant:
    """The manifest is no entry of itself, so it is changed in place."""

    def plant(folder: Path) -> None:
        path = folder / "qconvert.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        put(*keys, value=value)(raw)
        path.unlink()
        path.write_text(json.dumps(raw), encoding="utf-8")
        reseal(folder)

    return plant


def two_tokens_exchanged(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.__getitem__)[70:72]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def another_pre_tokenizer(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def no_special_token(tokenizer: dict[str, Any]) -> None:
    for token in tokenizer["added_tokens"]:
        token["special"] = False


def another_template(folder: Path) -> None:
    """The template marks the speakers otherwise, in whichever file it stands."""
    if (folder / "chat_template.jinja").is_file():
        in_text("chat_template.jinja", lambda text: text.replace("<|im_start|>", "<|im_end|>", 1))(folder)
    else:
        replaced = put("chat_template", value=lambda text: text.replace("<|im_start|>", "<|im_end|>", 1))
        in_json("tokenizer_config.json", replaced)(folder)


def no_window(config: dict[str, Any]) -> None:
    config["use_sliding_window"] = not config.get("use_sliding_window", False)
    config.pop("layer_types", None)
    config["sliding_window"] = config.get("sliding_window") or 64
    config["max_window_layers"] = 1


def other_base(config: dict[str, Any]) -> None:
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = 12345.0
    else:
        config["rope_theta"] = 12345.0


FILES: dict[str, Plant] = {
    "manifest: another end token": in_manifest("tokens", "eos", value=[7]),
    "manifest: no end token": in_manifest("tokens", "eos", value=[]),
    "manifest: twice the context": in_manifest("model", "context_length", value=lambda length: 2 * length),
    "manifest: half the bytes of a token": in_manifest(
        "kv_cache", "bytes_per_token", value=lambda size: size // 2
    ),
    "manifest: another rotary base": in_manifest("model", "rope", "rope_theta", value=12345.0),
    "config.json: another rotary base": in_json("config.json", other_base),
    "config.json: windows on or off": in_json("config.json", no_window),
    "config.json: another epsilon": in_json("config.json", put("rms_norm_eps", value=1e-4)),
    "config.json: another end token": in_json("config.json", put("eos_token_id", value=7)),
    "generation_config.json: another end token": in_json(
        "generation_config.json", put("eos_token_id", value=[7])
    ),
    "generation_config.json: another temperature": in_json(
        "generation_config.json", put("temperature", value=1.5)
    ),
    "genai_config.json: another end token": in_json(
        "genai_config.json", put("model", "eos_token_id", value=7)
    ),
    "genai_config.json: another head size": in_json(
        "genai_config.json", put("model", "decoder", "head_size", value=8)
    ),
    "genai_config.json: keys for values": in_json(
        "genai_config.json",
        put("model", "decoder", "inputs", "past_key_names", value="past_key_values.%d.value"),
    ),
    "tokenizer: two tokens exchanged": in_json("tokenizer.json", two_tokens_exchanged),
    "tokenizer: another treatment of text": in_json("tokenizer.json", another_pre_tokenizer),
    "tokenizer: no token is special": in_json("tokenizer.json", no_special_token),
    "tokenizer_config.json: another end token": in_json(
        "tokenizer_config.json", put("eos_token", value="<|endoftext|>")
    ),
    "chat template: another mark": another_template,
}
