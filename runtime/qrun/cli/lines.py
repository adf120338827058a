"""Where the user's lines come from: a line editor in a terminal, plain lines in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from qrun.errors import QrunError
from qrun.folder.paths import own_folder

if TYPE_CHECKING:
    from prompt_toolkit.history import History


class LineReader(Protocol):
    """Where the user's messages come from."""

    def read(self) -> str:
        """One message.

        Raises:
            EOFError: there are no more. KeyboardInterrupt: Ctrl-C.
        """
        ...

    def pending(self) -> str:
        """What was typed when ``read`` was interrupted."""
        ...


def line_reader() -> LineReader:
    """What fits stdin."""
    return EditedLines() if sys.stdin.isatty() else PlainLines()


class PlainLines:
    """Lines of a pipe or a file, as UTF-8."""

    def read(self) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_input(line)

    def pending(self) -> str:
        return ""


class EditedLines:
    """Lines with editing and a history that outlives the program."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=keys, output=create_output(always_prefer_tty=True)
        )

    def read(self) -> str:
        return self._session.prompt("> ")

    def pending(self) -> str:
        return self._session.default_buffer.text


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = own_folder("XDG_STATE_HOME", ".local/state")
    if state is None:
        return InMemoryHistory()
    path = state / "qrun" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Private: only the user may read what was said to a model.
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()  # a chat without a history is better than none
    return FileHistory(path)


def decode_input(data: bytes) -> str:
    """Text that came through a pipe or from a file, without the byte order mark that some editors put first.

    Raises:
        QrunError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QrunError(
            f"the input is not UTF-8: {error}", hint="convert it, for instance with iconv"
        ) from error


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Do not show what is typed while an answer is printed (``^C`` too); the next line begins with it."""
    try:
        import termios
    except ImportError:  # not on Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
