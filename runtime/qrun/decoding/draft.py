"""A draft model: a smaller one of the same vocabulary, whose likeliest tokens are guesses for a larger one.

It reads what the larger model's answer holds, goes on by itself for some tokens, and forgets what did not
come true. Its time counts: how many tokens it guesses follows from how often they came true and from what its
steps take beside the larger model's. Where none is worth a try it rests, and is tried again after a while.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192).
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from qrun.backends.opening import Opening, open_session
from qrun.backends.session import Session
from qrun.decoding.gains import COUNTS, Share, StepCosts, worth
from qrun.decoding.sequence import Sequence
from qrun.decoding.slots import Slots
from qrun.errors import QrunError
from qrun.folder.manifest import find_model_folder, names_plan
from qrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A draft is given because it is thought to be good: it is tried until it has shown that it is not.
_HOPE, _SEEN = 0.7, 4.0
# Until it is measured, a step of the draft is taken to last as long as this share of the model's.
_STEP = 0.2
# Steps of the draft whose median counts.
_TIMES = 9
# Where no guess is worth a try the draft rests for so many steps, then twice as many, up to the last.
_REST, _LONGEST = 128, 4096
# After so many steps with guesses the draft has done well, and its next rest is a short one again.
_GOOD = 64
# So many first steps are tried in any case: a single one says too little of what such steps take.
_STEPS = 3
# Tokens that the draft reads at once.
_PIECE = 256
_log = logging.getLogger("qrun.engine")


class Draft:
    """A model folder that guesses for another one.

    Attributes:
        session: runs it.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    @classmethod
    def open(cls, path: str | Path, engine: str | Path, **options: Unpack[Opening]) -> Draft:
        """Open a draft for a model.

        Args:
            path: the draft's folder, or the .onnx in it.
            engine: the model's folder, or the .onnx or .plan in it.
            options: see ``Opening``.

        Raises:
            QrunError: it is a plan, its tokens are not the model's, or it cannot be opened.
        """
        if names_plan(path):
            raise QrunError(
                "a draft is a model folder: a plan cannot guess for another model",
                where=path,
                hint=f"give the folder that it was built from: {Path(path).parent}",
            )
        _check_same_tokens(find_model_folder(path), find_model_folder(engine))
        return cls(open_session(path, **options))


def _check_same_tokens(draft: Path, engine: Path) -> None:
    """Refuse a draft in whose tokenizer an id means another text than in the model's."""
    ours, theirs = Tokenizer.from_folder(engine).texts(), Tokenizer.from_folder(draft).texts()
    if ours == theirs:
        return
    token_id = min(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    meanings = (
        f"token {token_id} {_meaning(token_id, texts)} in {folder}"
        for texts, folder in ((theirs, draft), (ours, engine))
    )
    raise QrunError(
        f"the draft has another vocabulary than the model: {', and '.join(meanings)}",
        where=draft / "tokenizer.json",
        hint="take a smaller model of the same family, with the same tokenizer",
    )


def _meaning(token_id: int, texts: dict[int, str]) -> str:
    return f"is {texts[token_id]!r}" if token_id in texts else "is none"


class Drafting:
    """What a draft holds of an answer, and what was learnt of it.

    Args:
        draft: the smaller model.
        vocab_size: of the model for which it guesses.
    """

    def __init__(self, draft: Draft, vocab_size: int) -> None:
        facts = draft.session.manifest.model
        self._slots = Slots(draft.session)
        self._limit = facts.context_length
        # Both pad their logits as they like; what is beyond either vocabulary is no token of the tokenizer.
        self._vocab = min(facts.vocab_size, vocab_size)
        self._of: Sequence | None = None
        self._agreed = 0  # of the tokens held, those that are known to be the answer's
        self._seen = 0  # tokens of the answer whose ids were looked at
        self._share = Share(_HOPE, _SEEN)
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._rest, self._resting, self._good = _REST, 0, 0
        self._tried = self._steps = 0
        self._failed = False

    def guess(self, sequence: Sequence, costs: StepCosts) -> list[int]:
        """The tokens with which the draft would go on; none where they would not pay, or cannot be had."""
        self._tried = 0
        if self._failed or costs.single is None:  # without the time of a step none can be judged
            return []
        total = len(sequence.prompt_ids) + len(sequence.token_ids)
        most = min(COUNTS[-1], sequence.room - 1, self._limit - total + 1)
        if most < 1 or not self._knows(sequence):
            return []
        count = self._count(costs, most)
        if not count:
            return []
        try:
            found = self._draft(sequence, count)
        except QrunError as error:  # for lack of memory, say: the answer is the same without it
            _log.warning("the draft model is given up: %s", error.what)
            self._failed = True
            return []
        self._tried = len(found)
        self._steps += 1
        return found

    def learn(self, came_true: int) -> None:
        """What became of the last guesses."""
        tried, self._tried = self._tried, 0  # the next step's guesses may be another's
        self._share.see_step(tried, min(came_true, tried))

    def _knows(self, sequence: Sequence) -> bool:
        """Whether all tokens so far are in the draft's vocabulary."""
        if sequence is not self._of:
            self._of, self._agreed = sequence, -1
            self._seen = 0 if max(sequence.prompt_ids) < self._vocab else -1
        if self._seen >= 0:
            new = sequence.token_ids[self._seen :]
            self._seen = self._seen + len(new) if max(new, default=0) < self._vocab else -1
        return self._seen >= 0

    def _count(self, costs: StepCosts, most: int) -> int:
        """How many guesses are worth a try."""
        if self._resting:
            self._resting -= 1
            if self._resting:
                return 0
            self._share = Share(_HOPE, _SEEN)  # the text may be another one by now
        assert costs.single is not None
        each = median(self._times) / costs.single if self._times else _STEP
        count = worth(self._share.value, most, costs, each)
        if not count and self._steps < _STEPS:
            count = 1
        if count:
            self._good += 1
        elif most == COUNTS[-1]:  # and not only for want of room
            self._resting = self._rest
            self._rest = _REST if self._good >= _GOOD else min(2 * self._rest, _LONGEST)
            self._good = 0
        return count

    def _draft(self, sequence: Sequence, count: int) -> list[int]:
        logits = self._slots.feed(0, self._catch_up(sequence), logits="last")
        found: list[int] = []
        while True:
            token_id = int(logits[: self._vocab].argmax())
            # What the model says of an end shows in the step before it: nothing is gained by guessing one.
            if token_id in sequence.ends:
                return found
            found.append(token_id)
            if len(found) == count:
                return found
            started = perf_counter()
            logits = self._slots.step([token_id])[0]
            self._times.append(perf_counter() - started)

    def _catch_up(self, sequence: Sequence) -> list[int]:
        """Forget what the answer does not hold, read what is new but for a last piece; returns that piece."""
        prompt, answer = len(sequence.prompt_ids), sequence.token_ids
        if self._agreed < 0:
            text = [*sequence.prompt_ids, *answer]
            kept = self._slots.keep(0, text)
        else:
            held = self._slots.token_ids[0]
            kept, total = self._agreed, prompt + len(answer)
            while kept < min(len(held), total - 1) and held[kept] == answer[kept - prompt]:
                kept += 1
            self._slots.trim(0, kept)
            text = []
        new = text[kept:] if text else answer[kept - prompt :]
        while len(new) > _PIECE:
            self._slots.feed(0, new[:_PIECE], logits="none")
            new = new[_PIECE:]
        self._agreed = prompt + len(answer)
        return new
