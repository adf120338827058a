"""If these fail, a terminal breaks an answer's words, or shows and copies something that was not said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrun.cli.wrapping import Shown, Wrapping
from tests.fakes import REPOSITORY


def rows(text: str, width: int, cut: int = 1) -> list[str]:
    """The rows of a terminal in which ``text`` came in pieces of ``cut`` characters."""
    screen = pyte.Screen(width, 100)
    stream = pyte.Stream(screen)
    wrapping = Wrapping()
    for start in range(0, len(text), cut):
        stream.feed(wrapping.feed(text[start : start + cut], width).replace("\n", "\r\n"))
    shown = [row.rstrip() for row in screen.display]
    while shown and not shown[-1]:
        shown.pop()
    return shown


PROSE = "The quick brown fox jumps over the lazy dog"
LAYOUTS = {
    "words": (PROSE, ["The quick brown fox", "jumps over the lazy", "dog"]),
    "a line that is just full": ("12345 7890 234567890 2345", ["12345 7890 234567890", "2345"]),
    "a word longer than a line": (
        "see abcdefghijklmnopqrstuvwxyz ok",
        ["see", "abcdefghijklmnopqrst", "uvwxyz ok"],
    ),
    "a link at the beginning": ("abcdefghijklmnopqrstuvwxyz", ["abcdefghijklmnopqrst", "uvwxyz"]),
    "the text's own lines": ("one\n\ntwo three\n", ["one", "", "two three"]),
    "Chinese": ("中文没有空格所以可以在任何字之间换行", ["中文没有空格所以可以", "在任何字之间换行"]),
    "Chinese in an odd place": ("a中文没有空格所以可以在任何", ["a中文没有空格所以可", "以在任何"]),
    "no comma at the beginning": ("中文没有空格所以可以，在任何", ["中文没有空格所以可", "以，在任何"]),
    "no bracket at the end": ("中文没有空格所以可「在任何」", ["中文没有空格所以可", "「在任何」"]),
    "Chinese and Latin": ("可以在任何字之间abcdef换行", ["可以在任何字之间", "abcdef换行"]),
    "Korean has spaces": ("한국어는 단어 사이에 띄어쓰기", ["한국어는 단어 사이에", "띄어쓰기"]),
    "emoji": ("say 🙂🙂🙂🙂🙂🙂🙂🙂🙂 yes", ["say 🙂🙂🙂🙂🙂🙂🙂🙂", "🙂 yes"]),
    "combining marks take no cell": (
        "e\u0301" * 9 + " " + "a\u0308" * 9 + " b",
        ["é" * 9 + " " + "ä" * 9, "b"],
    ),
    "items": (
        "- the first of the items\n    - one inside of it",
        ["- the first of the", "items", "    - one inside of", "it"],
    ),
}


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_lines_end_between_words_however_the_text_is_cut_into_pieces(name: str, cut: int) -> None:
    text, expected = LAYOUTS[name]
    assert rows(text, 20, cut) == expected


AS_IT_IS = {
    "fenced": "Look:\n```py\nresult = function(argument, another)\n```\n",
    "fenced with tildes": "~~~\nresult = function(argument, another)\n~~~\n",
    "indented": "    result = function(argument, another)\n",
    "indented by a tab": "\tresult = function(argument, another)\n",
    "a table": "name   value   a third column\n",
    "tabs": "name\tvalue and others in a row\n",
}


@pytest.mark.parametrize("cut", [1, 5, 1000])
@pytest.mark.parametrize("name", AS_IT_IS)
def test_code_and_lines_with_several_spaces_stay_as_they_are(name: str, cut: int) -> None:
    text = AS_IT_IS[name]
    wrapping = Wrapping()
    pieces = [text[start : start + cut] for start in range(0, len(text), cut)]
    assert "".join(wrapping.feed(piece, 20) for piece in pieces) == text


def test_text_behind_code_is_wrapped_again_and_code_in_a_sentence_is_none() -> None:
    fenced = "````\n```\nnot the end of it, for it has too few marks\n````\n"
    wrapping = Wrapping()
    assert wrapping.feed(fenced, 20) == fenced
    assert wrapping.feed("a sentence that is wrapped", 20) == "a sentence that is\nwrapped"
    assert Wrapping().feed("```a``` in a line\nis no beginning of code", 20) == (
        "```a``` in a line\nis no beginning of\ncode"
    )


def test_a_piece_is_shown_at_once_and_not_held_until_its_word_ends() -> None:
    wrapping = Wrapping()
    assert [wrapping.feed(piece, 20) for piece in ("Par", "is", " is", " ", "a")] == [
        "Par",
        "is",
        " is",
        "",
        " a",
    ]


def test_copied_text_has_no_space_too_many() -> None:
    """A line break takes the place of a space; what the terminal itself cuts has no line break in it."""
    assert Wrapping().feed(PROSE, 20) == "The quick brown fox\njumps over the lazy\ndog"
    for whole in ("abcdefghijklmnopqrstuvwxyz", "中文没有空格所以可以在任何字之间换行"):
        assert Wrapping().feed(whole, 20) == whole
    assert Wrapping().feed("12345678901234567890   \nnext", 20) == "12345678901234567890\nnext"


WORDS = st.text(alphabet="abc,.(中文，「」🙂é한", min_size=1, max_size=12)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", " ", " ", "\n"])), max_size=30).map(
    lambda parts: "".join(word + space for word, space in parts)
)


@given(text=TEXTS, cut=st.integers(1, 9))
def test_nothing_is_lost_and_no_word_of_letters_is_broken(text: str, cut: int) -> None:
    shown = rows(text, 26, cut)
    assert "".join("".join(shown).split()) == "".join(text.split())
    assert shown == rows(text, 26, 10_000), "the layout depends on how the text was cut"
    whole = set(re.findall(r"[a-c]+", text))
    assert set(re.findall(r"[a-c]+", "\n".join(shown))) <= whole


def test_a_new_width_counts_from_the_next_word_on() -> None:
    wrapping = Wrapping()
    assert wrapping.feed("The quick brown fox", 80) == "The quick brown fox"
    # The terminal has laid this row out in its own way, so the next word begins one.
    assert wrapping.feed(" jumps over the lazy dog", 12) == "\njumps over\nthe lazy dog"
    assert wrapping.feed(" and sleeps in the sun", 80) == " and sleeps in the sun"


def test_a_word_that_a_resize_has_moved_is_not_taken_back() -> None:
    """Only the terminal knows where the word stands now: going back could delete something else."""
    wrapping = Wrapping()
    assert wrapping.feed("The quick brown f", 20) == "The quick brown f"
    assert wrapping.feed("oxes", 10) == "oxes"
    assert wrapping.feed(" jump", 10) == "\njump"
    # A row that fits both widths has not moved.
    wrapping = Wrapping()
    assert wrapping.feed("The quick brown f", 20) == "The quick brown f"
    assert wrapping.feed("ox", 18) == "\x1b[2D\x1b[K\nfox"


def test_what_is_no_terminal_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown()
    shown.show(PROSE * 10)
    shown.end()
    assert capsys.readouterr().out == PROSE * 10 + "\n"


# The commands

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("options", "wrapped"), [((), True), (("--raw",), False), (("--regex", ".*"), False)], ids=str
)
def test_one_answer_is_wrapped_too_unless_its_line_breaks_matter(
    tmp_path: Path, options: tuple[str, ...], wrapped: bool
) -> None:
    """A text that is continued may be code, and what fits a form is read by programs."""
    process = pexpect.spawn(
        sys.executable,
        [str(HERE / "generating.py"), str(tmp_path), PROSE, *options],
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)},
        dimensions=(24, 40),
        use_poll=True,
        encoding="utf-8",
        timeout=15,
    )
    process.expect(pexpect.EOF)
    assert ("lazy\r\ndog" in process.before) == wrapped, process.before
    assert ("lazy dog" in process.before) != wrapped


def test_a_pipe_gets_lines_of_any_length(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "chatting.py"), str(tmp_path), PROSE * 3],
        input="go\n",
        capture_output=True,
        encoding="utf-8",
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "40"},
    )
    assert done.stdout == PROSE * 3 + "\n"
