"""A GGUF file as a checkpoint's folder: small files made of its metadata, and links to its parts.

The folder is a temporary one: everything that reads a folder (inspect, export, verify) reads a GGUF file too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from qconvert.checkpoint.file_state import BrokenFileError, refuse_pointer
from qconvert.checkpoint.gguf.container import Container, open_container
from qconvert.checkpoint.gguf.marker import ENDING, MARKER
from qconvert.checkpoint.gguf.metadata import ROPE_FACTORS, Fields, config_of
from qconvert.checkpoint.gguf.scratch import new_folder
from qconvert.checkpoint.gguf.vocabulary import Vocabulary
from qconvert.errors import QconvertError
from qrun.text.chat_template import ADDITIONAL_TEMPLATES

_PART = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_TEMPLATE = "tokenizer.chat_template"
_NO_TOKENIZER = (None, "none", "no_vocab")
_MOST_PARTS = 10_000
_NAME = re.compile(r"[\w.-]{1,64}")


def unpack(path: Path) -> Path:
    """The folder of a GGUF file, which lives as long as this process.

    Args:
        path: the file, or any part of one that is split.

    Raises:
        QconvertError: a part is missing, damaged or of another file; a model, an entry or a tokenizer that is
            not covered.
    """
    paths = _parts(path)
    files = [_open(each) for each in paths]
    _check_parts(files)
    first = files[0]
    fields = Fields(first.path, first.metadata)
    shapes = {name: stored.shape for file in files for name, stored in file.tensors.items()}
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise QconvertError(
            f"{path.name} has no embedding: it holds a vocabulary, an adapter or a part of a model.",
            where=path,
            hint="give the file of the whole language model",
        )
    config = config_of(
        fields,
        vocab_size=embedding[0],
        tied="output.weight" not in shapes,
        rope_factors=_rope_factors(files),
    )
    kind = fields.text("tokenizer.ggml.model")
    vocabulary = None if kind in _NO_TOKENIZER else Vocabulary(fields)
    texts = {} if vocabulary is None else _text_files(vocabulary, config)
    folder = new_folder() / _folder_name(path)
    folder.mkdir()
    links = {each: _link_name(each) for each in paths}
    for each, name in links.items():
        (folder / name).symlink_to(each.resolve())
    contents: dict[str, Any] = {
        "config.json": {key: value for key, value in config.items() if value is not None},
        **texts,
        MARKER: {"source": str(path), "parts": list(links.values())},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    _write_templates(fields, folder)
    return folder


def _open(path: Path) -> Container:
    try:
        if path.is_file():
            refuse_pointer(path)
    except BrokenFileError as error:
        raise QconvertError(f"{path.name}: {error.detail}.", where=path, hint=error.hint) from error
    except OSError as error:
        raise QconvertError(f"{path.name} cannot be read: {error.strerror}.", where=path) from error
    return open_container(path)


def _parts(path: Path) -> list[Path]:
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    before, _, count, ending = found.groups()
    if not 1 <= int(count) <= _MOST_PARTS:
        raise QconvertError(f"{path.name} says that there are {count} parts.", where=path)
    paths = [path.with_name(f"{before}{number:05}-of-{count}{ending}") for number in range(1, int(count) + 1)]
    if missing := [each.name for each in paths if not each.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise QconvertError(
            f"The part {missing[0]} is missing{more}.",
            where=path.parent,
            hint="download all parts into one folder",
        )
    return paths


def _check_parts(files: list[Container]) -> None:
    for number, file in enumerate(files):
        fields = Fields(file.path, file.metadata)
        stated = [fields.number(f"split.{key}") or 0 for key in ("no", "count")]
        due = [number, len(files)] if len(files) > 1 else [0, stated[1] if stated[1] in (0, 1) else 1]
        if stated != due:
            what = f"says that it is part {stated[0]!r} of {stated[1]!r}, counted from 0"
            raise QconvertError(
                f"{file.path.name} {what}: due is {due[0]} of {due[1]}.",
                where=file.path,
                hint="give the parts the names under which they were published, all in one folder",
            )
    total = Fields(files[0].path, files[0].metadata).number("split.tensors.count")
    found = sum(len(file.tensors) for file in files)
    if total is not None and len(files) > 1 and total != found:
        raise QconvertError(
            f"The parts hold {found} tensors, and {total} are stated.",
            where=files[0].path,
            hint="download all parts again",
        )


def _text_files(vocabulary: Vocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """Files of the tokenizer, and which tokens end an answer."""
    found = {
        "tokenizer.json": vocabulary.tokenizer_json(),
        "tokenizer_config.json": vocabulary.tokenizer_config(config["max_position_embeddings"]),
    }
    if ends := vocabulary.ends():
        named = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
        found["generation_config.json"] = {
            "eos_token_id": ends,
            **{key: value for key, value in named.items() if value is not None},
        }
    return found


def _rope_factors(files: list[Container]) -> NDArray[np.float32] | None:
    for file in files:
        if ROPE_FACTORS in file.tensors:
            stored = file.tensors[ROPE_FACTORS]
            if stored.kind != GGMLQuantizationType.F32 or len(stored.shape) != 1 or stored.shape[0] > 1 << 16:
                raise QconvertError(
                    f"{ROPE_FACTORS} is {stored.kind.name} {list(stored.shape)}", where=file.path
                )
            return np.asarray(quants.dequantize(file.rows(ROPE_FACTORS), stored.kind)).reshape(-1)
    return None


def _link_name(path: Path) -> str:
    """A name with the ending by which everything else knows a GGUF file."""
    return f"{path.name.removesuffix(path.suffix) if path.suffix.lower() == ENDING else path.name}{ENDING}"


def _folder_name(path: Path) -> str:
    found = _PART.fullmatch(path.name)
    return (found[1].rstrip("-") if found else path.stem) or "model"


def _write_templates(fields: Fields, folder: Path) -> None:
    if (template := fields.text(_TEMPLATE)) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for key in fields.entries:
        name = key.removeprefix(f"{_TEMPLATE}.")
        if name == key:
            continue
        if not _NAME.fullmatch(name) or name.startswith("."):
            fields.refuse(key, name, "the name of a template")
        (folder / ADDITIONAL_TEMPLATES).mkdir(exist_ok=True)
        (folder / ADDITIONAL_TEMPLATES / f"{name}.jinja").write_text(fields.text(key) or "", encoding="utf-8")
