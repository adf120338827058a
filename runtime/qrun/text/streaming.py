"""From token ids to the text that a reader sees: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from qrun.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes, so at most 4 tokens: what stays unreadable for longer is not one.
_UNREADABLE_TOKENS = 8
_KEPT_UNREADABLE = 4


class IncrementalDetokenizer:
    """Turns tokens into text while they arrive. All that it gives equals ``tokenizer.decode`` of all ids.

    Each step decodes a window of the last few tokens: some whose text was given out already, because
    decoders look at a token's left neighbour, and those that are held back because they end amid a
    character. So a long answer costs time in proportion to its length.

    Source: the prefix and read offsets of Text Generation Inference and vLLM
    (``detokenize_incrementally``). Unlike there, a run of bytes that never becomes text is given up.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._printed_tokens = 0  # how many of the window's tokens have been given out
        self._printed_text = ""  # their text

    def push(self, token_id: int) -> str:
        """The text that has become final with this token, often empty amid a character."""
        if self._has_no_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            return self._print(text)
        if len(self._window) - self._printed_tokens >= _UNREADABLE_TOKENS:
            return self._let_go(text)
        return ""

    def flush(self) -> str:
        """The text still held back, half a character as U+FFFD. The next push starts a new text."""
        rest = self._decode(self._window)[len(self._printed_text) :]
        self._restart([])
        return rest

    def _has_no_text(self, token_id: int) -> bool:
        """Whether decoding leaves a token out; a character may then continue after it."""
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return True
        return self._tokenizer.token(token_id) is None

    def _print(self, text: str) -> str:
        new = text[len(self._printed_text) :]
        self._window = self._window[self._printed_tokens :]
        self._printed_tokens = len(self._window)
        self._printed_text = self._decode(self._window)
        return new

    def _let_go(self, text: str) -> str:
        """Give up on the older tokens of an unreadable run, at a place where no character is cut."""
        cut = len(self._window) - _KEPT_UNREADABLE
        left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
        # A sequence of bytes across the cut is one U+FFFD in the whole and two or more in the halves.
        if not right or left + right != text:
            return ""
        new = left[len(self._printed_text) :]
        self._restart(self._window[cut:])
        return new

    def _restart(self, window: list[int]) -> None:
        self._window, self._printed_tokens, self._printed_text = window, 0, ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class StopStrings:
    """Ends a text at the first of some strings, and shows nothing of that string.

    The first is the one that is complete first, and the longest of those that are complete with the
    same character. So the result does not depend on how the text was cut into pieces.

    Args:
        stop: non-empty strings; none at all is allowed.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "SamplingParams refuses an empty stop string"
        self._stop = tuple(stop)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string once it is complete.

        Text after the stop string is dropped, and so is everything pushed later. Held back is only
        the longest end of the text that a stop string begins with.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return text[:start], self._matched
        safe = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """The text held back for a stop string that has not come."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
