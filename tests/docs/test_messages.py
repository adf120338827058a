"""docs/troubleshooting.md quotes messages that exist: a user looks his message up there."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.reading import REPOSITORY

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
# Rows that quote no message of ours.
OTHERS = ("pip downloads gigabytes of CUDA", "CUDAExecutionProvider", "TensorrtExecutionProvider")
_FILLED_IN = "\0"  # stands where a message has a value
_FEWEST_LETTERS = 12  # of a message's own words: fewer would fit any sentence


@cache
def templates(*, fewest: int) -> list[re.Pattern[str]]:
    """Strings of both packages, whole and clause by clause; anything may stand for a value that is put in.

    Args:
        fewest: letters that a message has of its own.
    """
    found = set()
    for root in ("qconvert", "runtime/qrun"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.add(_text(node))
    clauses = {clause for text in found for clause in (text, *re.split(r"[;:,] |\[/\]", text))}
    return [_pattern(text) for text in clauses if len(re.sub(r"[^a-zA-Z]", "", text)) >= fewest]


def _text(node: ast.JoinedStr) -> str:
    return "".join(str(part.value) if isinstance(part, ast.Constant) else _FILLED_IN for part in node.values)


def _pattern(text: str) -> re.Pattern[str]:
    words = " ".join(text.replace("`", "").split()).strip(" .:\n")
    return re.compile(".*".join(re.escape(part) for part in words.split(_FILLED_IN)), re.IGNORECASE)


def quoted() -> list[str]:
    """The first cell of each row, without the remark in brackets after it."""
    rows = re.findall(r"^\| (.*?) \| .* \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [re.sub(r" \((`[^`]*`|and similar|or .*?)\)", "", row) for row in rows if row != "message"]
    return [cell for cell in cells if not cell.startswith(OTHERS)]


def stands_in_the_source(message: str) -> bool:
    """Whether a message of the source fits into the row, or the row's words are a part of one."""
    message = message.replace("`", "").removesuffix("...").strip(" .:")
    if any(pattern.fullmatch(message) for pattern in templates(fewest=6)):
        return True
    if any(pattern.search(message) for pattern in templates(fewest=_FEWEST_LETTERS)):
        return True
    written = message.lower()
    return any(written in pattern.pattern.replace("\\", "").lower() for pattern in templates(fewest=6))


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_stands_in_the_source(message: str) -> None:
    assert stands_in_the_source(message)


def test_a_message_that_nobody_says_is_found() -> None:
    assert not stands_in_the_source("NAME was eaten by N elephants")
    assert len(quoted()) > 60
