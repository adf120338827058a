"""The small files of a checkpoint, judged before the work as qrun judges them in the finished folder.

An export copies these files. Whatever qrun would refuse in them (a tokenizer that cannot be read, a template
whose syntax is wrong, a sampling default out of range) is therefore refused here, not after minutes of work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qconvert.checkpoint.file_state import DOWNLOAD_HINT, BrokenFileError, FileState, refuse_pointer
from qconvert.checkpoint.tokenizer import FROM_THESE, read_tokenizer
from qconvert.checkpoint.tokens import named_tokens
from qconvert.errors import QconvertError
from qrun.errors import QrunError
from qrun.sampling.params import resolve
from qrun.text.chat_template import ADDITIONAL_TEMPLATES, ChatTemplate

# Read together with tokenizer.json.
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MEND = "mend or download the file again"
_LEAVE_OUT = "mend it in the checkpoint, or delete it there: the default then applies"
_CONVERSATION = ({"role": "user", "content": "Hello!"},)


def text_file_states(folder: Path) -> list[FileState]:
    """The states of configuration, generation defaults, tokenizer and chat templates."""
    tokenizer_config = read_json_object(folder / "tokenizer_config.json")[1] or {}
    template = "in tokenizer_config.json" if "chat_template" in tokenizer_config else "no chat template"
    states = [
        text_file_state(folder, "config.json", absent="nothing says what this model is"),
        text_file_state(folder, "generation_config.json", required=False, absent="defaults apply"),
        text_file_state(folder, "tokenizer.json", absent="text cannot become token ids"),
        text_file_state(folder, "tokenizer_config.json", required=False, absent="no special-token names"),
        text_file_state(folder, "chat_template.jinja", required=False, absent=template),
        *(text_file_state(folder, name, required=False) for name in _further_files(folder)),
    ]
    return _used(folder, states)


def text_file_state(folder: Path, name: str, *, required: bool = True, absent: str = "") -> FileState:
    """The state of a JSON file (which must hold an object) or of a template (which must be UTF-8)."""
    path = folder / name
    if not path.is_file():
        return FileState(name, 0, "missing", absent, DOWNLOAD_HINT, required)
    size = path.stat().st_size
    try:
        refuse_pointer(path)
        if size == 0:
            raise BrokenFileError("truncated", "the file is empty")
        if path.suffix == ".json":
            _parse_json_object(path)
        else:
            _text(path)
    except BrokenFileError as broken:
        return FileState(name, size, broken.status, broken.detail, broken.hint, required)
    return FileState(name, size, "whole", required=required)


def read_json_object(path: Path) -> tuple[FileState, dict[str, Any] | None]:
    """A JSON file's state, and its content where the file is whole."""
    state = text_file_state(path.parent, path.name)
    return state, _parse_json_object(path) if state.status == "whole" else None


def _further_files(folder: Path) -> Iterator[str]:
    """Files that few checkpoints have, and that are read where they are there."""
    for name in BESIDE_TOKENIZER[1:]:
        if (folder / name).is_file():
            yield name
    for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja")):
        yield f"{ADDITIONAL_TEMPLATES}/{path.name}"


def _used(folder: Path, states: list[FileState]) -> list[FileState]:
    """The states once more, with what using whole files has shown."""
    found = {state.name: state for state in states}

    def try_out(
        name: str, use: Callable[[], object], *, reads: Iterable[str] = (), hint: str = _MEND
    ) -> None:
        if any(found[each].harmful for each in (name, *reads) if each in found):
            return
        try:
            use()
        except QrunError as error:
            # It may be in another of the files that are read than the one that comes first.
            named = [each for each in found if error.where is not None and error.where.endswith(f"/{each}")]
            blamed = max(named, key=len, default=name)
            state = found[blamed]
            detail, remedy = " ".join(error.what.split()), error.hint or hint
            found[blamed] = FileState(blamed, state.size, "garbage", detail, remedy, state.required)

    try_out("generation_config.json", lambda: _check_generation(folder), hint=_LEAVE_OUT)
    if found["tokenizer.json"].status == "missing" and all((folder / name).is_file() for name in FROM_THESE):
        detail = f"made from {' and '.join(FROM_THESE)}"
        found["tokenizer.json"] = FileState("tokenizer.json", 0, "missing", detail, required=False)
    if found["tokenizer.json"].status == "whole" or not found["tokenizer.json"].required:
        try_out("tokenizer.json", lambda: read_tokenizer(folder), reads=BESIDE_TOKENIZER, hint=DOWNLOAD_HINT)
    if (folder / "chat_template.jinja").is_file() or _has_template(folder):
        first = next(
            name for name in ("chat_template.jinja", "tokenizer_config.json") if (folder / name).is_file()
        )
        others = (*BESIDE_TOKENIZER, *_further_files(folder))
        try_out(first, lambda: ChatTemplate.from_folder(folder).render(_CONVERSATION), reads=others)
    return list(found.values())


def _has_template(folder: Path) -> bool:
    settings = read_json_object(folder / "tokenizer_config.json")[1] or {}
    return settings.get("chat_template") is not None


def _check_generation(folder: Path) -> None:
    path = folder / "generation_config.json"
    values = read_json_object(path)[1] or {}
    named_tokens(values.get("eos_token_id"), path)
    try:
        resolve({}, values)
    except QrunError as error:
        raise QconvertError(error.what, hint=_LEAVE_OUT) from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenFileError("garbage", f"not UTF-8 text: {error.reason}") from error


def _parse_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        detail = f"malformed JSON in line {error.lineno}, column {error.colno}: {error.msg}"
        raise BrokenFileError("garbage", detail, _MEND) from error
    except (ValueError, RecursionError) as error:
        raise BrokenFileError("garbage", f"malformed JSON: {error}", _MEND) from error
    if not isinstance(value, dict):
        raise BrokenFileError("garbage", f"holds a JSON {type(value).__name__}, not an object", DOWNLOAD_HINT)
    return value
