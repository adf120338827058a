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
    from prompt_toolkit.key_binding import KeyPress


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

    def left(self) -> bool:
        """Whether Ctrl-D was pressed since the last ``read``. Other keys begin the next line."""
        ...

    def unsent(self) -> str:
        """What was typed since the last ``read``. It is asked for when no further ``read`` will return it."""
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

    def left(self) -> bool:
        return False

    def unsent(self) -> str:
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

    def left(self) -> bool:
        from prompt_toolkit.input.typeahead import store_typeahead
        from prompt_toolkit.keys import Keys

        keys = self._typed()
        store_typeahead(self._session.input, keys)
        return self._session.input.closed or any(press.key is Keys.ControlD for press in keys)

    def unsent(self) -> str:
        from prompt_toolkit.keys import Keys

        text = ""
        for press in self._typed():
            if press.key is Keys.Backspace:
                text = text[:-1]
            elif not isinstance(press.key, Keys):
                text += press.key
            elif press.key in (Keys.Enter, Keys.ControlJ):
                text += "\n"
        return text

    def _typed(self) -> list[KeyPress]:
        """All keys that no ``read`` has seen."""
        from prompt_toolkit.input.typeahead import get_typeahead

        keys = get_typeahead(self._session.input)
        while more := self._session.input.read_keys():
            keys += more
        return keys


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
    """Do not show what is typed while the line editor does not read, and keep it as the editor would get it.

    In a terminal's ordinary mode Ctrl-D would come out as a zero byte. Ctrl-C is still a signal, which keeps
    what was typed before.
    """
    try:
        import termios
    except ImportError:  # not on Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:6], [*before[6]]]
    silent[0] &= ~termios.ICRNL
    silent[3] = before[3] & ~(termios.ECHO | termios.ICANON | termios.IEXTEN) | termios.NOFLSH
    silent[6][termios.VMIN], silent[6][termios.VTIME] = 1, 0
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
