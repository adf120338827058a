"""A chat in the terminal: reads lines, prints answers, and has five commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event as Flag
from threading import Thread
from types import FrameType

from qrun.answer import Answer, Piece
from qrun.chat import Chat
from qrun.cli.lines import LineReader, keys_unseen, line_reader
from qrun.cli.terminal import complain, note, size
from qrun.cli.wrapping import Shown
from qrun.decoding.generate import PREFILL_CHUNK, Prefilled
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes

HELP = """\
/reset        forget the conversation
/system TEXT  change the system message (/system alone shows it)
/stats        tokens, times and memory so far
/help         this list
/exit         leave (so does Ctrl-D, also while an answer comes)
Ctrl-C stops an answer; Alt-Enter starts a new line."""
WATCH_SECONDS = 0.05  # between two looks at the keyboard while an answer comes


class ChatConsole:
    """Runs a chat until the user leaves it.

    Args:
        chat: the conversation.
        reader: the user's lines; by default a line editor in a terminal and plain lines otherwise.
    """

    def __init__(self, chat: Chat, reader: LineReader | None = None) -> None:
        self.chat = chat
        self._reader = reader or line_reader()
        self._stopped = False  # whether Ctrl-C or Ctrl-D has stopped the running answer
        self._leaving = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/stats": self._stats,
            "/help": lambda _: note(HELP),
        }

    def run(self) -> None:
        """Until Ctrl-D, /exit or the end of a pipe. Ctrl-C in a pipe ends it as KeyboardInterrupt."""
        with ExitStack() as terminal:
            if sys.stdin.isatty():
                terminal.enter_context(keys_unseen())
            self._banner()
            self._converse()
            if unsent := self._reader.unsent().strip():
                note(f"(typed and not sent: {unsent})")

    def _converse(self) -> None:
        while not self._leaving:
            try:
                line = self._reader.read().strip()
                if line in ("/exit", "/quit"):
                    return
                self._handle(line)
            except EOFError:
                return
            except QrunError as error:  # the conversation goes on
                complain(error)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                if not self._reader.pending():
                    note("Ctrl-D or /exit leaves.")

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command in self._commands:
            self._commands[command](rest.strip())
        elif line.startswith("/") and "/" not in command[1:]:  # a path is a message
            raise QrunError(f"there is no command {command}", hint="/help lists them")
        elif line:
            self.answer(line)

    def answer(self, line: str) -> None:
        """One turn: print the answer while it comes; Ctrl-C ends it, and Ctrl-D the chat too.

        Raises:
            QrunError: see ``Chat.send``.
        """
        progress, shown = PrefillLine(), Shown()
        self._stopped = False
        with ExitStack() as terminal:
            if sys.stdin.isatty():
                terminal.enter_context(_interrupts(self._stop))
                terminal.enter_context(self._watched())
            try:
                for event in self.chat.send(line):
                    if self._stopped:  # also when it was asked for before there was anything to cancel
                        self.chat.cancel()
                    if isinstance(event, Prefilled):
                        progress.update(event)
                    elif isinstance(event, Piece):
                        progress.clear()
                        shown.show(event.text)
                    else:
                        shown.end()
                        self._end(event)
            finally:
                progress.clear()

    def _stop(self) -> None:
        self._stopped = True
        self.chat.cancel()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Ctrl-D stops the answer, and the chat ends after it.

        A thread looks for the key, because a long prompt and tokens without text bring no event for a while.
        """
        ended = Flag()

        def watch() -> None:
            while not ended.is_set():
                if self._reader.left():
                    self._leaving = True
                    self._stop()
                    return
                ended.wait(WATCH_SECONDS)

        thread = Thread(target=watch, name="qrun-keys", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _end(self, answer: Answer) -> None:
        if answer.finish_reason == "cancelled":
            note("(stopped)" if answer.text else "(stopped before it began: the message is forgotten)")
        elif answer.finish_reason == "length":
            note("(cut off at --max-tokens)")
        elif answer.finish_reason == "context":
            note(f"(the context of {self.chat.context.cache.limit:,} tokens is full: /reset starts over)")
        if sys.stdin.isatty():
            note()

    def _reset(self, _: str) -> None:
        self.chat.reset()
        note("The conversation is forgotten.")

    def _system(self, text: str) -> None:
        if text:
            self.chat.system(text)
            note("The system message is changed, from the next turn on.")
        elif self.chat.system_message is None:
            note("No system message is set: the model's chat template decides.")
        else:
            note(f"The system message is: {self.chat.system_message}")

    def _stats(self, _: str) -> None:
        for line in statistics(self.chat):
            note(line)

    def _banner(self) -> None:
        manifest = self.chat.model.manifest
        facts = (
            manifest.precision,
            self.chat.model.device,
            f"context of {manifest.model.context_length:,} tokens",
        )
        note(f"{manifest.name}: {', '.join(facts)}")
        if manifest.verification != "passed":
            note(verdict(manifest.verification))
        if sys.stdin.isatty():
            note("/help lists the commands, Ctrl-D leaves.")


class PrefillLine:
    """One line that tells how much of a long prompt has been read; nothing for a short one or a pipe."""

    def __init__(self) -> None:
        self._enabled = sys.stderr.isatty()
        self._shown = False
        self._start: int | None = None

    def update(self, event: Prefilled) -> None:
        if self._start is None:
            self._start = event.done
        if self._enabled and event.total - self._start > 2 * PREFILL_CHUNK and event.done < event.total:
            self._shown = True
            sys.stderr.write(f"\r\x1b[Kreading the prompt: {event.done:,} of {event.total:,} tokens")
            sys.stderr.flush()
        else:
            self.clear()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def verdict(status: str) -> str:
    """What a manifest's verification status means, for people."""
    if status == "not verified":
        return "not verified: never compared with its checkpoint (`qconvert verify` does that)"
    return f"not verified: its verification says {status!r}"


def statistics(chat: Chat) -> list[str]:
    """The /stats lines: the last answer, all answers, and the KV cache."""
    cache = chat.context.cache
    lines = []
    if chat.answers:
        last = chat.answers[-1]
        new = last.prompt_tokens - last.reused_tokens
        lines += [
            f"last prompt   {last.prompt_tokens:,} tokens, {last.reused_tokens:,} of them from the cache",
            f"  new         {new:,} {_timing(last.prefill_seconds, last.prefill_tokens_per_second)}",
            f"last answer   {last.completion_tokens:,} tokens "
            f"{_timing(last.decode_seconds, last.decode_tokens_per_second)}",
        ]
        if chat.context.speculation is not None:
            lines.append(f"  guessed     {last.guessed_tokens:,} tokens, {last.accepted_tokens:,} came true")
    generated = sum(answer.completion_tokens for answer in chat.answers)
    seconds = sum(answer.prefill_seconds + answer.decode_seconds for answer in chat.answers)
    full = forecast_bytes(chat.model.manifest, cache.limit)
    return [
        *lines,
        f"conversation  {_plural(len(chat.answers), 'answer')}, {generated:,} tokens in {seconds:.1f} s",
        f"context       {cache.length:,} of {cache.limit:,} tokens",
        f"KV cache      {size(cache.nbytes)} now, {size(full)} at full context",
    ]


def _timing(seconds: float, rate: float) -> str:
    return f"in {seconds:.2f} s ({rate:.1f} tokens/s)"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextmanager
def _interrupts(cancel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``cancel`` instead of raising, so that no step is broken off in the middle."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
