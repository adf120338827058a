"""What README.md and docs/ say, taken out of the files: blocks, code spans, commands, options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = ("qconvert", "qrun")
# Words that make a line of a block, or a code span, a command.
PROGRAMS = (*OURS, "make", "pip", "python", "git", "hf")
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


def pages() -> list[Path]:
    """Every page that a user reads, in the order of reading."""
    return [
        REPOSITORY / "README.md",
        *sorted((REPOSITORY / "docs").glob("*.md")),
        REPOSITORY / "benchmarks" / "README.md",
    ]


@dataclass(frozen=True)
class Place:
    """A piece of a page: ``line`` counts from 1."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    """An indented or fenced block; ``language`` is that of the fence, or empty."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The blocks of code of a page, in order."""
    found: list[Block] = []
    name, lines = _name(page), page.read_text(encoding="utf-8").splitlines()
    index, after_blank, in_list = 0, True, False
    while index < len(lines):
        line = lines[index]
        if line.startswith("```"):
            end = lines.index("```", index + 1)
            found.append(Block(name, index + 2, line[3:].strip(), tuple(lines[index + 1 : end])))
            index = end + 1
            continue
        if after_blank and line.startswith("    ") and not in_list:
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = [text[4:] for text in lines[index:end]]
            while not body[-1].strip():
                body.pop()
            found.append(Block(name, index + 1, "", tuple(body)))
            index = end
            continue
        if line.strip():
            in_list = bool(re.match(r"(-|\d+\.) ", line)) or (in_list and line.startswith(" "))
        after_blank = not line.strip()
        index += 1
    return found


def spans(page: Path) -> Iterator[Place]:
    """Code between backticks, outside of blocks; one that goes over a line's end is joined by a space."""
    name, lines = _name(page), page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for number in range(block.line - 1, block.line - 1 + len(block.lines)):
            lines[number] = ""
    lines = ["" if line.startswith("```") else line for line in lines]
    text = "\n".join(lines)
    for match in _SPAN.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Place(name, line, " ".join(match.group(1).replace("\\|", "|").split()))


def commands(page: Path) -> list[Place]:
    """Every command line that a page shows: in a block (with or without ``$``) or between backticks.

    A comment after two spaces and # is no part of it. Usage lines (``[OPTIONS]``) are told by
    ``commands_page``'s own test, and file names such as ``qrun/`` are no commands.
    """
    found = []
    for block in blocks(page):
        if block.language in ("python", "json"):
            continue
        for number, raw in enumerate(block.lines, start=block.line):
            line = re.split(r"\s{2,}#|\s# ", raw)[0].strip().removeprefix("$ ")
            found += [Place(block.page, number, part) for part in line.split(" && ") if _is_command(part)]
    found += [
        Place(span.page, span.line, part)
        for span in spans(page)
        for part in span.text.split(" && ")
        if _is_command(part)
    ]
    return [place for place in found if "[OPTIONS]" not in place.text]


def _is_command(text: str) -> bool:
    words = text.split()
    return len(words) > 1 and words[0] in PROGRAMS and "=" not in words[1]


def mentions(page: Path) -> list[Place]:
    """Options that a page names, each by itself: ``--prefill`` of `--prefill int8`, also inside commands."""
    found = []
    for place in (*spans(page), *commands(page)):
        for word in _words(place.text):
            if re.fullmatch(r"--[a-z][a-z0-9-]+(=.*)?", word):
                found.append(Place(place.page, place.line, word.split("=")[0]))
    return found


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a lone quotation mark
        return text.split()


def _name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))
