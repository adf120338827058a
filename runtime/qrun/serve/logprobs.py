"""Log-probabilities in the two shapes that OpenAI's completions have for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qrun.decoding.sequence import Token
from qrun.text.streaming import IncrementalDetokenizer
from qrun.text.tokenizer import Tokenizer


def of_chat(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Those of a piece of a chat's answer."""
    content = [
        {
            **_described(tokenizer, token.token_id),
            "logprob": token.logprobs.chosen,
            "top_logprobs": [
                {**_described(tokenizer, token_id), "logprob": value}
                for token_id, value in token.logprobs.likeliest
            ],
        }
        for token in tokens
        if token.logprobs is not None
    ]
    return {"content": content, "refusal": None}


class PlainLogprobs:
    """Those of a plain completion, piece by piece: text offsets go on from one piece to the next."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        self._length = 0

    def push(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The lists of the next tokens; one without log-probabilities has null in them."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)  # of a token amid a character: where the character begins
            self._length += len(self._detokenizer.push(token.token_id))
        return {
            "tokens": [self._text(token.token_id) for token in tokens],
            "token_logprobs": [None if token.logprobs is None else token.logprobs.chosen for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        """By their texts, and the token itself as well, as in the original."""
        if token.logprobs is None:
            return None
        found: dict[str, float] = {}
        # Of two tokens with one text the likelier one is reported.
        for token_id, value in (*token.logprobs.likeliest, (token.token_id, token.logprobs.chosen)):
            found.setdefault(self._text(token_id), value)
        return found

    def _text(self, token_id: int) -> str:
        """The text of a token, and of one that is part of a character its bytes in OpenAI's notation."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _described(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "bytes": list(raw)}
