"""Several tokens in one step: guesses that the model checks all at once, and how many are worth a try.

A step over a token and k guesses after it costs less than k + 1 steps, since the weights are read once.
The sequence takes its tokens from the step's logits one after the other, as from single steps, and goes on
as long as its own choice is the guess: so an answer does not depend on what was guessed, sampled ones
included, but for the last bits in which logits of several positions differ from those of one
(docs/life-of-a-token.md). Guesses come from the text itself, or from a smaller model (``draft.py``).

It must not cost more than it gains. How often guesses come true is watched also where none is tried, and what
a step of so many tokens takes is measured while it is used.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from qrun.backends.session import Session
from qrun.decoding.draft import Draft, Drafting
from qrun.decoding.gains import COUNTS, Share, StepCosts, worth
from qrun.decoding.guesses import TextGuesses
from qrun.decoding.sequence import Sequence

# Before anything is seen, this share of the guesses is taken to come true, with the weight of so many
# observations. It is too little for a try: a text has to show first that it repeats itself.
_HOPE, _SEEN = 0.25, 3.0
# Guesses are judged by the length of their match, which makes them more likely: up to 2 tokens, up to 4, ...
_LENGTHS = (2, 4, 8, 16)


class Speculation:
    """What has been learnt of guesses and steps; kept for all answers of one conversation.

    Attributes:
        guessed, accepted: tokens of all answers so far that were tried, and those of them that came true.

    Args:
        text: guess from the text itself.
        draft: a smaller model, which guesses where the text has no guess that is worth a try.
        vocab_size: of the model whose answers these are; what is beyond it is no guess.
    """

    def __init__(self, *, text: bool = True, draft: Draft | None = None, vocab_size: int = 0) -> None:
        self.guessed = self.accepted = 0
        self._costs = StepCosts()
        self._repeats = _Repeats() if text else None
        self._drafting = None if draft is None else Drafting(draft, vocab_size)

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens to try after the last one of an answer; none where they would not pay.

        The answer has at least one token. ``learn`` is told what became of them, before the next step.
        """
        found: list[int] = []
        if self._repeats is not None:
            found = self._repeats.guess(sequence, self._costs)
        if not found and self._drafting is not None:
            found = self._drafting.guess(sequence, self._costs)
        return found

    def learn(self, guesses: Tokens[int], came_true: int, seconds: float) -> None:
        """What became of a step.

        Args:
            guesses: what was tried in it, after the last token.
            came_true: how many of them were the sequence's choice, from the first one on.
            seconds: that the model took.
        """
        self._costs.took(1 + len(guesses), seconds)
        self.guessed += len(guesses)
        self.accepted += came_true
        for source in (self._repeats, self._drafting):
            if source is not None:
                source.learn(came_true)


def new_speculation(session: Session, *, speculate: bool, draft: Draft | None) -> Speculation | None:
    """What tries several tokens in one step of a model; None where nothing is to be guessed from."""
    if not speculate and draft is None:
        return None
    return Speculation(text=speculate, draft=draft, vocab_size=session.manifest.model.vocab_size)


class _Repeats:
    """Guesses from the text itself, and how often they came true by the length of their match."""

    def __init__(self) -> None:
        self._shares = [Share(_HOPE, _SEEN) for _ in range(len(_LENGTHS) + 1)]
        self._of: Sequence | None = None
        self._text = TextGuesses()
        self._taken = 0
        self._watched: tuple[int, Share] | None = None
        self._tried = 0

    def guess(self, sequence: Sequence, costs: StepCosts) -> list[int]:
        if sequence is not self._of:
            self._of, self._text, self._taken = sequence, TextGuesses(sequence.prompt_ids), 0
        new = sequence.token_ids[self._taken :]
        self._text.extend(new)
        self._taken += len(new)
        found, length = self._text.guess(min(COUNTS[-1], sequence.room - 1))
        self._watched, self._tried = None, 0
        if not found:
            return []
        share = self._shares[sum(length > most for most in _LENGTHS)]
        self._watched = (found[0], share)
        self._tried = worth(share.value, len(found), costs)
        return found[: self._tried]

    def learn(self, came_true: int) -> None:
        """What became of the step; of another's guesses where this one had none to try."""
        if self._watched is None or self._of is None:
            return
        first, share = self._watched
        if self._tried:
            share.see_step(self._tried, came_true)
        else:  # it can be seen all the same whether the guess was right
            share.see(self._of.token_ids[self._taken :][:1] == [first])
