"""If these fail, a person in a terminal cannot stop an answer, leave the chat, or trust what is shown."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import pexpect
import pyte
import pytest

from qrun.cli.console import PrefillLine
from qrun.cli.terminal import printable, show, size
from qrun.decoding.generate import PREFILL_CHUNK, Prefilled
from tests.fakes import REPOSITORY

CHATTING = Path(__file__).parent / "chatting.py"


@pytest.fixture
def state(tmp_path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def terminal(state, tmp_path):
    """Starts a chat with a fake model in a terminal, of 80 columns if nothing else is said."""
    running: list[pexpect.spawn] = []

    def start(*answers: str, columns: int = 80, command: Sequence[str] = (sys.executable,)) -> pexpect.spawn:
        variables = {
            "XDG_STATE_HOME": str(state),
            "TERM": "xterm",
            "PYTHONPATH": str(REPOSITORY),
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nothing here answers the query for the cursor's position
        }
        process = pexpect.spawn(
            command[0],
            [*command[1:], str(CHATTING), str(tmp_path), *answers],
            env={**os.environ, **variables},
            dimensions=(24, columns),
            use_poll=True,
            encoding="utf-8",
            timeout=15,
        )
        running.append(process)
        process.expect_exact("Ctrl-D leaves.")
        wait_for_prompt(process)
        return process

    yield start
    for process in running:
        process.close(force=True)


def wait_for_prompt(process: pexpect.spawn) -> None:
    """Until the line editor has set the terminal up (bracketed paste on) and shows its cursor."""
    process.expect(r"\x1b\[\?2004h.*?>.*?\x1b\[\?25h")


def leave(process: pexpect.spawn) -> None:
    wait_for_prompt(process)
    process.sendeof()
    process.expect(pexpect.EOF)
    process.close()
    assert (process.exitstatus, process.signalstatus) == (0, None)


def test_a_question_is_answered_and_ctrl_d_leaves(terminal):
    process = terminal("Paris.")
    process.send("France?\r")
    process.expect_exact("Paris.\r\n")
    leave(process)


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal):
    process = terminal("endless", "Rome.")
    process.send("France?\r")
    process.expect_exact("la la la")
    process.sendintr()
    process.expect_exact("(stopped)")
    assert "^C" not in process.before, "the key stands amid the answer"
    wait_for_prompt(process)
    process.send("Italy?\r")
    process.expect_exact("Rome.\r\n")
    leave(process)


@pytest.mark.parametrize("answer", ["endless", "silent"])
def test_ctrl_d_while_an_answer_comes_stops_it_and_leaves(terminal, answer):
    process = terminal(answer)
    process.send("France?\r")
    if answer == "endless":
        process.expect_exact("la la la")
    else:
        process.expect_exact("France?\x1b")  # the line editor has let go of the line
    process.sendeof()
    process.expect_exact("(stopped")
    process.expect(pexpect.EOF)
    process.close()
    assert (process.exitstatus, process.signalstatus) == (0, None)


def test_ctrl_d_right_after_a_question_stops_its_answer_and_leaves(terminal):
    """The line editor itself reads both keys, before there is an answer to stop."""
    process = terminal("endless")
    process.send("France?\r\x04")
    process.expect_exact("(stopped")
    process.expect(pexpect.EOF)
    process.close()
    assert (process.exitstatus, process.signalstatus) == (0, None)


def test_what_is_typed_while_an_answer_comes_is_the_next_line(terminal):
    process = terminal("endless", "Rome.", "Bern.")
    process.send("France?\r")
    process.expect_exact("la la la")
    process.send("Itali\x7fy?\rSchweiz, übrigens")
    process.expect_exact("la la la")
    process.sendintr()
    process.expect_exact("(stopped)")
    assert "Ital" not in process.before, "keys are shown amid the answer"
    process.expect_exact("> Italy?")
    process.expect_exact("Rome.\r\n")
    process.expect_exact("> Schweiz, übrigens")
    process.send("\r")
    process.expect_exact("Bern.\r\n")
    leave(process)


def test_what_was_typed_before_ctrl_d_is_told_and_does_not_reach_the_shell(terminal):
    process = terminal("endless", command=("sh", "-c", '"$0" "$@"; cat', sys.executable))
    process.send("France?\r")
    process.expect_exact("la la la")
    process.send("Itali\x7fy?\rrm -r x\r\x04")
    process.expect_exact("(typed and not sent: Italy?\r\nrm -r x)")
    process.sendline("and now cat reads")
    process.sendeof()
    process.expect(pexpect.EOF)
    assert process.before.count("and now cat reads") == 2, "once as it is typed, once by cat"
    assert "rm -r" not in process.before, "cat got it"


def test_the_terminal_is_left_as_it_was(terminal):
    script = 'before=$(stty -g); "$0" "$@"; test "$before" = "$(stty -g)" && echo the same'
    process = terminal("endless", command=("sh", "-c", script, sys.executable))
    process.send("France?\r")
    process.expect_exact("la la la")
    process.sendeof()
    process.expect(pexpect.EOF)
    assert process.before.endswith("the same\r\n")


def test_ctrl_c_at_an_empty_prompt_says_how_to_leave(terminal):
    process = terminal()
    process.sendintr()
    process.expect_exact("Ctrl-D or /exit leaves.")
    leave(process)


def test_ctrl_c_drops_a_line_that_was_begun(terminal):
    process = terminal("Rome.")
    process.send("Fran")
    process.expect_exact("Fran")
    process.sendintr()
    wait_for_prompt(process)
    process.send("Italy?\r")
    process.expect_exact("Rome.\r\n")
    leave(process)
    assert "leaves" not in (process.before or "")


def test_the_history_outlives_the_chat_and_is_private(terminal, state):
    process = terminal("Paris.")
    process.send("France?\r")
    process.expect_exact("Paris.\r\n")
    leave(process)
    history = state / "qrun" / "history"
    assert "+France?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = terminal("Paris.")
    again.send("\x1b[A")  # the up arrow
    again.expect_exact("France?")
    again.send("\r")
    again.expect_exact("Paris.\r\n")
    leave(again)


def test_a_history_that_cannot_be_written_costs_nothing_but_itself(terminal, state):
    state.write_text("a file where the folder should be")
    process = terminal("Paris.")
    process.send("France?\r")
    process.expect_exact("Paris.\r\n")
    leave(process)


def test_reset_and_stats_in_a_terminal(terminal):
    process = terminal("Paris.", "Rome.")
    process.send("France?\r")
    process.expect_exact("Paris.\r\n")
    wait_for_prompt(process)
    process.send("/stats\r")
    process.expect_exact("conversation  1 answer, 6 tokens")
    wait_for_prompt(process)
    process.send("/reset\r")
    process.expect_exact("The conversation is forgotten.")
    wait_for_prompt(process)
    process.send("France?\r")
    process.expect_exact("Paris.\r\n")
    wait_for_prompt(process)
    process.send("/exit\r")
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0


def test_a_model_cannot_send_commands_to_the_terminal(terminal):
    process = terminal("a\x1b]0;title\x07b\x9b31mc\x08d")
    process.send("go\r")
    process.expect_exact("a]0;titleb31mcd\r\n")
    leave(process)


def test_a_second_line_is_begun_with_alt_enter(terminal):
    process = terminal("ok")
    process.send("one\x1b\rtwo\r")
    process.expect_exact("ok\r\n")
    leave(process)
    history = (Path(process.env["XDG_STATE_HOME"]) / "qrun" / "history").read_text()
    assert "+one\n+two" in history


# Lines that are longer than the terminal (see test_wrapping)

LONG = "The quick brown fox jumps over the lazy dog and then, 中文没有空格, 🙂 it sleeps extraordinarily."


def screen(shown: str, columns: int) -> list[str]:
    """Rows of a terminal that got this."""
    terminal = pyte.Screen(columns, 24)
    pyte.Stream(terminal).feed(shown)
    return [row.rstrip() for row in terminal.display]


def test_an_answer_is_wrapped_at_the_terminals_width(terminal):
    process = terminal(LONG, columns=40)
    process.send("go\r")
    process.expect("(?s)The quick.*ily\\.\r\n")
    assert screen(process.after, 40)[:4] == [
        "The quick brown fox jumps over the lazy",
        "dog and then, 中文没有空格, 🙂 it sleeps",
        "extraordinarily.",
        "",
    ]
    leave(process)


def test_a_new_size_of_the_terminal_is_taken_up_while_the_answer_comes(terminal):
    process = terminal("endless")
    process.send("go\r")
    process.expect_exact("la la la")
    for columns in (31, 60):
        process.setwinsize(24, columns)
        expected = [" ".join(["la"] * (columns // 3 + (columns % 3 == 2)))] * 8
        for _ in range(50):  # what was on its way when the width changed comes first
            process.expect("(?s)(.*?\r\n){8}")
            shown = screen(process.after, columns)[:8]
            if shown == expected:
                break
        assert shown == expected
    process.sendintr()
    process.expect_exact("(stopped)")
    leave(process)


# What reaches a terminal


def test_control_characters_are_dropped_and_the_rest_is_kept():
    text = "tab\tline\n你好 é 🙂‍ \xa0"
    assert printable(text) == text
    everything = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    assert printable(everything) == "\t\n"


def test_a_pipe_gets_the_text_as_it_is(capsys):
    show("a\x1b[31mb\r")
    assert capsys.readouterr().out == "a\x1b[31mb\r"


def test_a_long_prompt_shows_its_progress_in_a_terminal_alone(capsys, monkeypatch):
    total = 10 * PREFILL_CHUNK
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        line = PrefillLine()
        for done in (0, PREFILL_CHUNK, total):
            line.update(Prefilled(done, total))
        shown = capsys.readouterr().err
        assert ("reading the prompt: 256 of 2,560 tokens" in shown) == is_terminal
        assert shown.endswith("\r\x1b[K") == is_terminal, "the line is still there beside the answer"


def test_a_short_rest_of_a_long_prompt_shows_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = PrefillLine()
    for done in (9000, 9100):
        line.update(Prefilled(done, 9100))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (46_080, "46 kB"),
        (377_487_360, "377.5 MB"),
        (3.1e9, "3.10 GB"),
    ],
)
def test_sizes_are_short(count, shown):
    assert size(count) == shown
