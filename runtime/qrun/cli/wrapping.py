"""An answer in a terminal: its lines end between words, although its text comes piece by piece."""

from __future__ import annotations

import os
import re
import sys
from unicodedata import category

from rich.cells import cell_len, get_character_cell_size

from qrun.cli.terminal import printable, show

_PARTS = re.compile(r"\n|[ \t]+|[^ \t\n]+")
_FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)")
# Markdown's indented code, as opposed to an item of a nested list.
_INDENTED = re.compile(r"(?: {4,}| *\t)(?!\s*(?:[-*+]|\d+[.)]) )")
_LINE_START = 200  # characters of a line that are kept to recognise code by
_OPENING = ("Ps", "Pi")
# Closing brackets and quotes, other punctuation, Japanese length and repetition marks, skin tones of emoji.
_CLOSING = ("Pe", "Pf", "Po", "Lm", "Sk")
_HANGUL = range(0xAC00, 0xD7A4)  # Korean has spaces between its words
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)  # two of them make a flag
_JOINER = "\u200d"


class Shown:
    """Prints one answer.

    Args:
        wrap: False leaves the ends of lines to the terminal, for text whose line breaks matter.
    """

    def __init__(self, *, wrap: bool = True) -> None:
        self._wrapping = Wrapping() if wrap else None
        self._text = ""

    @property
    def begun(self) -> bool:
        """Whether anything was printed."""
        return bool(self._text)

    def show(self, text: str) -> None:
        """Print a piece at once. A pipe or a file gets it unchanged."""
        self._text = text or self._text  # before printing: Ctrl-C may come while it is printed
        width = columns() if self._wrapping else 0
        if self._wrapping and width:
            sys.stdout.write(self._wrapping.feed(printable(text), width))
            sys.stdout.flush()
        else:
            show(text)

    def end(self) -> None:
        """End the last line, so that what follows begins on one of its own."""
        if not self._text.endswith("\n"):
            self._text = ""
            show("\n")


def columns() -> int:
    """Cells in a line of the terminal; 0 where stdout is none, or one that cannot erase what it shows."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown"):
        return 0
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 0


class Wrapping:
    """Turns pieces of text into what a terminal should get, so that no line ends inside of a word.

    Only spaces are held back. A word that turns out to be too long for its line is erased there and printed
    again on the next one. The line break takes the place of the spaces before it and nothing is padded, so
    text that is copied from the terminal has no space too many. A word longer than a line, and Chinese and
    Japanese without spaces, are cut by the terminal itself, so that they are whole when they are copied.

    Code in fences, indented code, and the rest of a line after several spaces or a tab (as in tables) are
    printed as they are.
    """

    def __init__(self) -> None:
        self._width = 0
        self._fence = ""  # that of the code block which the text is in
        self._begin_line()

    def feed(self, text: str, width: int) -> str:
        """What to print for a further piece of text.

        Args:
            text: without control characters other than newline and tab.
            width: cells in a line of the terminal now.
        """
        if width != self._width:
            self._resize(width)
        return "".join(self._put(part) for part in _units(text))

    def _begin_line(self) -> None:
        """A new line of the text."""
        self._line = ""  # its beginning
        self._several_spaces = False
        self._gap = ""  # spaces that are not printed yet: a line break may take their place
        self._last = ""  # the character before the next one; empty after a space
        self._begin_row()

    def _begin_row(self) -> None:
        """A new row of the terminal, after a line break of the text or one of ours."""
        self._cells = 0  # printed since that line break
        self._column = 0  # where the cursor is; at the width, the next character goes to the next row
        self._column_known = True
        self._word = ""
        # Cells to go back to where the word before ends, if this word has to move to the next row; 0 if it
        # may not move.
        self._taken_back = 0

    def _put(self, part: str) -> str:
        if part == "\n":
            return self._end_line()
        self._line += part[: _LINE_START - len(self._line)] if len(self._line) < _LINE_START else ""
        if part[0] in " \t":
            self._gap += part
            self._last = ""
            self._several_spaces |= bool(self._line.strip()) and (len(self._gap) > 1 or "\t" in self._gap)
            return ""
        continues = bool(self._last) and not _may_break(self._last, part[0])
        self._last = part[-1]
        return self._continue_word(part) if continues else self._begin_word(part)

    def _begin_word(self, part: str) -> str:
        room = self._width - self._column
        lead = ""
        if self._column and not self._stays():
            fits = len(self._gap) + cell_len(part) <= room
            # Where the terminal begins a new row by itself, a line break of ours would only be copied with
            # the text.
            if not self._column_known or (not fits and (self._gap or room)):
                self._gap = ""
                self._begin_row()
                lead = "\n"
        gap_cells, first = len(self._gap), not self._column
        lead += self._print_gap()
        self._word = part
        cut = self._advance(part)
        self._taken_back = 0 if first or cut else gap_cells + cell_len(part)
        return lead + part

    def _continue_word(self, part: str) -> str:
        if self._taken_back and self._column + cell_len(part) > self._width and not self._stays():
            # After a character in the last cell the cursor stays on that cell until the next one is printed.
            back = self._taken_back - (self._column == self._width)
            return_to = f"\x1b[{back}D" if back else "\x1b[D\x1b[C"
            word = self._word + part
            self._begin_row()
            self._word = word
            self._advance(word)
            return f"{return_to}\x1b[K\n{word}"
        self._word += part
        cut = self._advance(part)
        self._taken_back = self._taken_back + cell_len(part) if self._taken_back and not cut else 0
        return part

    def _print_gap(self) -> str:
        gap, self._gap = self._gap, ""
        self._advance(gap)
        return gap

    def _end_line(self) -> str:
        # Spaces at the end that do not fit would make an empty row.
        gap = self._gap if self._column + len(self._gap) <= self._width else ""
        if fence := _FENCE.match(self._line):
            mark, rest = fence.groups()
            if not self._fence:
                self._fence = mark
            elif mark.startswith(self._fence) and not rest.strip():
                self._fence = ""
        self._begin_line()
        return gap + "\n"

    def _stays(self) -> bool:
        """Whether this line is left as it is."""
        return bool(self._fence) or self._several_spaces or _INDENTED.match(self._line) is not None

    def _advance(self, text: str) -> bool:
        """Move the cursor as the terminal does; returns whether it began a new row by itself."""
        cut = False
        for character in text:
            if character == "\t":
                self._column = min((self._column // 8 + 1) * 8, self._width - 1)
                continue
            cells = get_character_cell_size(character)
            self._cells += cells
            if self._column + cells > self._width:
                cut, self._column = True, cells
            else:
                self._column += cells
        return cut

    def _resize(self, width: int) -> None:
        """Go on with another width.

        A row that no longer fits is laid out again by some terminals and cut off by others. So the cursor's
        column is unknown then, and the next word begins a row.
        """
        if self._cells > min(self._width, width):
            self._column_known = False
            self._column = (self._cells - 1) % width + 1
            self._taken_back = 0
        self._width = width


def _units(text: str) -> list[str]:
    """Line breaks, spaces, and stretches of characters that may not be separated."""
    units: list[str] = []
    for part in _PARTS.findall(text):
        start = 0
        for index in range(1, len(part)):
            if _may_break(part[index - 1], part[index]):
                units.append(part[start:index])
                start = index
        units.append(part[start:])
    return units


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters that are no spaces.

    It may beside Chinese and Japanese characters and emoji, though not before closing punctuation or after
    an opening bracket or quote (a short form of Unicode's UAX #14).
    """
    if not (_stands_alone(before) or _stands_alone(after)):
        return False
    if get_character_cell_size(after) == 0 or before == _JOINER:
        return False
    if ord(before) in _FLAG_LETTERS and ord(after) in _FLAG_LETTERS:
        return False
    return category(before) not in _OPENING and category(after) not in _CLOSING


def _stands_alone(character: str) -> bool:
    return get_character_cell_size(character) == 2 and ord(character) not in _HANGUL
