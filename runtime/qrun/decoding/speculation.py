"""Several tokens in one step: guesses that the model checks all at once, and how many are worth a try.

A step over a token and k guesses after it costs less than k + 1 steps, since the weights are read once.
The sequence takes its tokens from the step's logits one after the other, as from single steps, and goes on
as long as its own choice is the guess: so an answer does not depend on what was guessed, sampled ones
included, but for the last bits in which logits of several positions differ from those of one
(docs/life-of-a-token.md). Guesses come from the text itself, from texts of the past (``suffix_cache.py``), or
from a smaller model (``draft.py``).

It must not cost more than it gains. How often guesses come true is watched also where none is tried, and what
a step of so many tokens takes is measured while it is used. Where several sequences decode, guesses are tried
only if each of them gains: their tokens are read in steps of their own then.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from qrun.backends.session import Session
from qrun.decoding.draft import Draft, Drafting
from qrun.decoding.gains import StepCosts, worth, worth_apart
from qrun.decoding.repeats import Repeats
from qrun.decoding.sequence import Sequence
from qrun.decoding.suffix_cache import SuffixCache
from qrun.errors import QrunError

# Of ended prompts and answers, so many tokens are kept in a server: some hundred requests, for 7 MB.
SUFFIX_TOKENS = 262_144


class Speculation:
    """What has been learnt of guesses and steps; kept for all answers of one conversation, or of a server.

    Attributes:
        guessed, accepted: tokens of all answers so far that were tried, and those of them that came true.

    Args:
        text: guess from the text itself.
        draft: a smaller model, which guesses where the text has no guess that is worth a try, while one
            sequence decodes alone.
        vocab_size: of the model whose answers these are; what is beyond it is no guess.
        past_tokens: of texts that have ended, which are kept to guess from them; 0 keeps none.
    """

    def __init__(
        self, *, text: bool = True, draft: Draft | None = None, vocab_size: int = 0, past_tokens: int = 0
    ) -> None:
        self.guessed = self.accepted = 0
        self._costs = StepCosts()
        self._past = SuffixCache(past_tokens) if text and past_tokens else None
        self._repeats = Repeats(self._past) if text else None
        self._drafting = None if draft is None else Drafting(draft, vocab_size)

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens to try after the last one of an answer that decodes alone; none where they would not pay.

        The answer has at least one token. ``learn`` is told what became of them, before the next step.
        """
        found: list[int] = []
        if self._repeats is not None:
            found, share = self._repeats.guess(sequence)
            found = self._repeats.take(sequence, worth(share, len(found), self._costs))
        if not found and self._drafting is not None:
            found = self._drafting.guess(sequence, self._costs)
        return found

    def guess_apart(self, sequences: Tokens[Sequence]) -> list[list[int]]:
        """The same for several answers: tokens to try in a step of each answer's own.

        All of them are empty where a step of all answers together is better for one of them.
        """
        if self._repeats is None:
            return [[] for _ in sequences]
        found = []
        for sequence in sequences:
            guesses, share = self._repeats.guess(sequence)
            found.append((share, len(guesses)))
        counts = worth_apart(found, self._costs)
        return [self._repeats.take(sequence, count) for sequence, count in zip(sequences, counts)]

    def learn(self, sequence: Sequence, guesses: Tokens[int], came_true: int, seconds: float) -> None:
        """What became of a step of one sequence.

        Args:
            sequence: whose it was.
            guesses: what was tried in it, after the last token.
            came_true: how many of them were the sequence's choice, from the first one on.
            seconds: that the model took.
        """
        self._costs.took(1 + len(guesses), seconds)
        self.guessed += len(guesses)
        self.accepted += came_true
        if self._repeats is not None:
            self._repeats.learn(sequence, came_true)
        if self._drafting is not None:
            self._drafting.learn(came_true)

    def learn_together(self, sequences: Tokens[Sequence], seconds: float) -> None:
        """What became of a step of several sequences, one token each, for which ``guess_apart`` was asked."""
        self._costs.took_together(len(sequences), seconds)
        if self._repeats is not None:
            for sequence in sequences:
                self._repeats.learn(sequence, 0)

    def ended(self, sequence: Sequence) -> None:
        """A sequence has come to its end: later ones may go on like it."""
        if self._past is not None and sequence.token_ids:
            self._past.add([*sequence.prompt_ids, *sequence.token_ids])


def new_speculation(
    session: Session, draft: Draft | None, past_tokens: int = 0, *, speculate: bool
) -> Speculation | None:
    """What tries several tokens in one step of a model; None where nothing is to be guessed from.

    Raises:
        QrunError: less than no tokens are to be kept.
    """
    if past_tokens < 0:
        raise QrunError(f"{past_tokens} tokens of earlier texts to guess from", hint="give 0 or more")
    if not speculate and draft is None:
        return None
    vocab_size = session.manifest.model.vocab_size
    return Speculation(text=speculate, draft=draft, vocab_size=vocab_size, past_tokens=past_tokens)
