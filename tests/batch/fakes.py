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
        starts = [at for at in range(len(seen)) if seen[at : at + len(header)] == header]
        if not starts:
            return seen[len(seen) % 7]
        said, asked = seen[starts[-1] + len(header) :], seen[: starts[-1]]
        end = max(at for at, token in enumerate(asked) if token == IM_END)
        begin = max(at for at in range(end) if asked[at] == IM_START) + opening
        wanted = [*asked[begin:end], IM_END]
        return wanted[min(len(said), len(wanted) - 1)]

    return rule


def echo_model(tokenizer: Tokenizer, context_length: int = 2048) -> Model:
    """Special tokens that are written out in a message stay text, as in a batch."""
    model = fake_model(tokenizer, echo(tokenizer), manifest=fake_manifest(context_length=context_length))
    model.literal = True
    return model
