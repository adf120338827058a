"""A model whose answer to a prompt is known: it says again what the user has said."""

from __future__ import annotations

from qrun.model import Model
from qrun.text.tokenizer import Tokenizer
from tests.fakes import IM_END, IM_START, Rule, fake_manifest, fake_model


def echo(tokenizer: Tokenizer) -> Rule:
    """The last message before the answer, word for word; a plain prompt is said again for ever."""
    header = tokenizer.encode("<|im_start|>assistant\n")
    opening = len(tokenizer.encode("<|im_start|>user\n"))

    def rule(seen: list[int]) -> int:
        start = _last(seen, header, len(seen))
        if start < 0:
            return seen[len(seen) % min(7, len(seen))]
        end = _last(seen, [IM_END], start)
        begin = _last(seen, [IM_START], end) + opening
        wanted = [*seen[begin:end], IM_END]
        return wanted[min(len(seen) - start - len(header), len(wanted) - 1)]

    return rule


def _last(seen: list[int], part: list[int], end: int) -> int:
    """Where ``part`` begins the last time before ``end``; -1 where it does not."""
    places = (at for at in range(end - 1, -1, -1) if seen[at] == part[0])
    return next((at for at in places if seen[at : at + len(part)] == part), -1)


def echo_model(tokenizer: Tokenizer, context_length: int = 2048) -> Model:
    """Special tokens that are written out in a message stay text, as in a batch."""
    model = fake_model(tokenizer, echo(tokenizer), manifest=fake_manifest(context_length=context_length))
    model.literal = True
    return model
