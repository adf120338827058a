"""The small files beside the graph: what each of them says is what the checkpoint says.

They decide on answers as much as the weights do: where an answer ends, how a prompt becomes tokens, by which
template a conversation is rendered. Each file is read as the programs that use it read it, once in the folder
and once in the checkpoint, so that only what changes the meaning is a difference. What a person has edited
since the export is not compared, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.config import load_config
from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.checkpoint.tokens import end_tokens
from qconvert.models.families import spec_of
from qconvert.models.spec import DecoderSpec
from qconvert.proof.report import Failure
from qrun.errors import QrunError
from qrun.sampling.params import resolve
from qrun.text.chat_template import ADDITIONAL_TEMPLATES
from qrun.text.tokenizer import read_json_object, read_special_tokens, read_tokenizer_config

if TYPE_CHECKING:
    from qconvert.proof.evidence import Evidence

# Bytes of one number in a KV cache.
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_TEXTS = ("short.txt", "chinese.txt", "code.txt")
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class _Claim:
    """Something that a file of the folder says, and what it should say."""

    what: str
    found: Any
    due: Any


_Claims = Callable[["Evidence"], Iterator[_Claim]]


def prove_companions(seen: Evidence) -> list[Failure]:
    """All files of the folder that change answers."""
    failed, edited = [], seen.manifest.edited_files()
    for name, claims in _CLAIMS.items():
        if name in edited:
            seen.notes.append(
                f"{name} was changed after the export, and was not compared with the checkpoint's"
            )
            continue
        try:
            failed += [
                Failure(name, f"{claim.what} is {_short(claim.found)}, due is {_short(claim.due)}")
                for claim in claims(seen)
                if claim.found != claim.due
            ]
        except QrunError as error:
            failed.append(Failure(name, f"it cannot be read: {error.what}"))
    return failed


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# What each file says.


def _manifest(seen: Evidence) -> Iterator[_Claim]:
    manifest, spec = seen.manifest, seen.spec
    yield _Claim("tokens.eos", sorted(manifest.eos_token_ids), sorted(seen.checkpoint.ends.ids))
    for name in ("head_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        yield _Claim(f"model.{name}", getattr(manifest.model, name), getattr(spec, name))
    if manifest.target != "tensorrt":  # its cache has the length that was asked for
        yield _Claim("model.context_length", manifest.model.context_length, spec.context_length)
    facts = manifest.raw.get("model", {})
    yield _Claim("model.rope", facts.get("rope"), dict(seen.checkpoint.config.rope_parameters))
    windows = list(spec.sliding_windows) if any(spec.sliding_windows) else None
    yield _Claim("model.sliding_windows", facts.get("sliding_windows"), windows)
    numbers = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_size
    yield _Claim("kv_cache.bytes_per_token", manifest.kv.bytes_per_token, numbers * _BYTES[manifest.kv.dtype])


def _config(seen: Evidence) -> Iterator[_Claim]:
    found, due = load_config(seen.manifest.folder), seen.checkpoint.config
    ours = spec_of(found)
    for field in fields(DecoderSpec):
        yield _Claim(field.name, getattr(ours, field.name), getattr(seen.spec, field.name))
    yield _Claim("rope_parameters", dict(found.rope_parameters), dict(due.rope_parameters))
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        yield _Claim(name, getattr(found, name), getattr(due, name))


def _generation_config(seen: Evidence) -> Iterator[_Claim]:
    folder = seen.manifest.folder
    found = read_json_object(folder / "generation_config.json") or None
    yield _Claim("what it says of sampling", resolve({}, found)[0], seen.checkpoint.sampling)
    ends = end_tokens(folder, seen.checkpoint.config, found, seen.spec.vocab_size)
    yield _Claim("what ends an answer", sorted(ends.ids), sorted(seen.checkpoint.ends.ids))


def _tokenizer(seen: Evidence) -> Iterator[_Claim]:
    found, due = (read_tokenizer(folder) for folder in (seen.manifest.folder, seen.checkpoint.folder))
    if due is None:
        return  # the checkpoint has no tokenizer, so the export has none either
    if found is None:
        yield _Claim("its content", None, "the checkpoint's tokenizer")
        return
    ours, theirs = (tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (found, due))
    wrong = next((token for token, place in theirs.items() if ours.get(token) != place), None)
    if wrong is not None:
        yield _Claim(f"the token {wrong!r}", ours.get(wrong), theirs[wrong])
    for name in _TEXTS:
        text = (files("qconvert") / "data" / name).read_text(encoding="utf-8")
        ids = due.encode(text, add_special_tokens=False).ids
        yield _Claim(f"what it makes of {name}", found.encode(text, add_special_tokens=False).ids, ids)
        yield _Claim(f"what it makes of {name}, read back,", found.decode(ids), due.decode(ids))
    special = [
        {place for place, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        for tokenizer in (found, due)
    ]
    yield _Claim("what it leaves out of answers", sorted(special[0]), sorted(special[1]))


def _tokenizer_config(seen: Evidence) -> Iterator[_Claim]:
    found, due = (read_tokenizer_config(folder) for folder in (seen.manifest.folder, seen.checkpoint.folder))
    for name in ("chat_template", "added_tokens_decoder"):
        yield _Claim(name, found.get(name), due.get(name))
    names = (read_special_tokens(folder) for folder in (seen.manifest.folder, seen.checkpoint.folder))
    yield _Claim("the names of special tokens", *names)


def _templates(seen: Evidence) -> Iterator[_Claim]:
    yield _Claim(
        "the template",
        _text(seen.manifest.folder / _TEMPLATE),
        _text(seen.checkpoint.folder / _TEMPLATE),
    )
    found, due = (
        {path.name: _text(path) for path in (folder / ADDITIONAL_TEMPLATES).glob("*.jinja")}
        for folder in (seen.manifest.folder, seen.checkpoint.folder)
    )
    for name, text in due.items():
        yield _Claim(f"{ADDITIONAL_TEMPLATES}/{name}", found.get(name), text)


def _text(path: Path) -> str | None:
    """A file's text without a byte order mark, which an export leaves out of its copy."""
    return path.read_bytes().decode("utf-8-sig", errors="replace") if path.is_file() else None


def _genai_config(seen: Evidence) -> Iterator[_Claim]:
    if seen.manifest.target == "tensorrt":
        return
    raw = read_json_object(seen.manifest.folder / "genai_config.json")
    model, search, spec = raw.get("model", {}), raw.get("search", {}), seen.spec
    decoder, sampling = model.get("decoder", {}), seen.checkpoint.sampling
    yield _Claim("model.type", model.get("type"), spec.model_type)
    for name in ("vocab_size", "context_length"):
        yield _Claim(f"model.{name}", model.get(name), getattr(spec, name))
    ends = model.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    yield _Claim("model.eos_token_id", sorted(ends), sorted(seen.checkpoint.ends.ids))
    yield _Claim("decoder.filename", decoder.get("filename"), seen.manifest.graph)
    for name in (
        *("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    ):
        yield _Claim(f"decoder.{name}", decoder.get(name), getattr(spec, name))
    names = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    yield _Claim("decoder.inputs", decoder.get("inputs"), names)
    names = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    yield _Claim("decoder.outputs", decoder.get("outputs"), names)
    for name in ("do_sample", "temperature", "top_p", "repetition_penalty"):
        yield _Claim(f"search.{name}", search.get(name), getattr(sampling, name))
    yield _Claim("search.max_length", search.get("max_length"), spec.context_length)


_CLAIMS: dict[str, _Claims] = {
    "qconvert.json": _manifest,
    "config.json": _config,
    "generation_config.json": _generation_config,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    _TEMPLATE: _templates,
    "genai_config.json": _genai_config,
}
