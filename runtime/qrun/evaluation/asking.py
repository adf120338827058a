"""Tasks become prompts, and what the model makes of them becomes results."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from qrun.answer import Answer
from qrun.decoding.sequence import Scored, Scoring
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.evaluation.matching import MATCHES
from qrun.evaluation.tasks import Task
from qrun.folder.manifest import Manifest, find_model_folder, read_manifest
from qrun.model import Model, folder_template
from qrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qrun.backends.session import Session

_SCORED = Scoring(count=0, generate=False)


@dataclass(frozen=True)
class Asked:
    """How all lines are asked, of every folder alike.

    Attributes:
        chat: whether prompts are turns of a chat, or texts that are continued.
        system: the system message of lines that have none.
        variables: of the chat template, such as ``{"enable_thinking": False}``.
        sampling: of answers: max_tokens, stop. They are greedy.
    """

    chat: bool = True
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a folder makes of one line.

    Attributes:
        right: whether the answer is the expected one; None for a text.
        answer: the answer's text, or the choice that was taken; empty for a text.
        finish_reason: why the answer ended, where one was generated.
        logprobs: of each choice, in order: that of all its tokens together.
        probability: of the right choice among all choices.
        nats: the text's negative log-likelihood.
        tokens: of the text whose likelihood this is; of a generated answer its own.
    """

    right: bool | None = None
    answer: str = ""
    finish_reason: str | None = None
    logprobs: tuple[float, ...] = ()
    probability: float | None = None
    nats: float = 0.0
    tokens: int = 0


@dataclass(eq=False)
class _Work:
    """A line on its way through the engine: one prompt, or several of which tokens are scored.

    Attributes:
        prompts: each with the place of its first token that counts.
        scores: log-probabilities of each prompt's tokens from its second one on.
    """

    task: Task
    prompts: list[tuple[list[int], int]]
    scores: list[list[float]]
    answer: Answer | None = None
    left: int = 0


class Prompts:
    """Makes prompts of tasks for one model.

    Raises:
        QrunError: a prompt that the model cannot be given, by its line; see ``Model.chat_prompt``.
    """

    def __init__(self, model: Model, asked: Asked) -> None:
        self._model, self._asked = model, asked
        self._limit = model.manifest.model.context_length

    def of(self, task: Task) -> list[tuple[list[int], int]]:
        """Each prompt of a task, with the place of its first token whose probability counts."""
        try:
            found = self._of(task)
            for ids, _ in found:
                if len(ids) > self._limit:
                    raise QrunError(f"{len(ids):,} tokens, and the context is {self._limit:,}")
        except QrunError as error:
            raise QrunError(
                f"line {task.number:,} ({task.name}) cannot be asked: {error.what}",
                where=self._model.manifest.folder,
                hint=error.hint,
            ) from error
        return found

    def _of(self, task: Task) -> list[tuple[list[int], int]]:
        encode = self._model.tokenizer.encode
        if task.kind == "perplexity":
            return self._windows(encode(task.text, add_special_tokens=True))
        if self._asked.chat:
            prompt = self._chat(task)
            # The answer's tokens follow those of the prompt, as if the model had chosen them.
            return [(prompt + encode(choice), len(prompt)) for choice in task.choices] or [(prompt, 0)]
        if task.prompt is None:
            raise QrunError("it is a conversation, and --raw continues texts")
        if not task.choices:
            return [(encode(task.prompt, add_special_tokens=True), 0)]
        # Blanks at the prompt's end belong to the first token of the choice, as in a text.
        beginning = encode(task.prompt.rstrip(), add_special_tokens=True)
        whole = [encode(task.prompt + choice, add_special_tokens=True) for choice in task.choices]
        return [(ids, min(len(beginning), len(ids) - 1)) for ids in whole]

    def _chat(self, task: Task) -> list[int]:
        messages = task.messages
        if self._asked.system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self._asked.system}, *messages)
        return self._model.chat_prompt(messages, literal=True, variables=self._asked.variables)

    def _windows(self, ids: list[int]) -> list[tuple[list[int], int]]:
        """Pieces of up to the context's length; each begins with the last token of the one before.

        So every token but the text's first one is predicted once.
        """
        if len(ids) < 2:
            raise QrunError("a text of one token has nothing to predict")
        return [(ids[start : start + self._limit], 1) for start in range(0, len(ids) - 1, self._limit - 1)]


class _Unopened:
    """What a session tells of its model without being one."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest


def check_tasks(path: Path, tasks: Sequence[Task], asked: Asked, chat_template: str | None = None) -> None:
    """Refuse lines that a model folder cannot be given. Only its text is read, so that it takes no time.

    Args:
        path: the folder, or the .onnx or .plan in it.
        tasks: the lines.
        asked: how they are asked.
        chat_template: see ``Model.open``.

    Raises:
        QrunError: see ``Prompts``; or the folder's text is not what it should be.
    """
    folder = find_model_folder(path)
    session = cast("Session", _Unopened(read_manifest(path)))
    template = folder_template(folder, chat_template)
    prompts = Prompts(Model(session, Tokenizer.from_folder(folder), template), asked)
    for task in tasks:
        prompts.of(task)


def results(engine: Engine, tasks: Sequence[Task], asked: Asked) -> Iterator[tuple[int, Result]]:
    """The result of each task with its place among ``tasks``, as they come.

    All prompts are made before the first is run, so that a line that cannot be asked costs no time.

    Raises:
        QrunError: a line that the model cannot be given, or an answer that could not be completed.
    """
    prompts = Prompts(engine.model, asked)
    waiting = deque(
        (place, _Work(task, found, [[] for _ in found], left=len(found)))
        for place, task in enumerate(tasks)
        for found in [prompts.of(task)]
    )
    events = SimpleQueue[tuple[int, _Work, int, Any]]()
    running = 0
    while waiting or running:
        while waiting and (not running or running + len(waiting[0][1].prompts) <= 2 * engine.slots):
            place, work = waiting.popleft()
            running += _submit(engine, place, work, asked, events)
        place, work, index, event = events.get()
        if isinstance(event, QrunError):
            raise event
        if isinstance(event, Scored):
            work.scores[index] += [token.logprobs.chosen for token in event.tokens if token.logprobs]
        elif isinstance(event, Answer):
            work.answer = event
            work.left, running = work.left - 1, running - 1
            if not work.left:
                yield (
                    place,
                    judged(
                        work.task,
                        work.answer,
                        [scores[first - 1 :] for scores, (_, first) in zip(work.scores, work.prompts)],
                    ),
                )


def _submit(engine: Engine, place: int, work: _Work, asked: Asked, events: SimpleQueue[Any]) -> int:
    """Queue all prompts of a task; returns their number."""

    def listener(index: int) -> Callable[[Any], None]:
        return lambda event: events.put((place, work, index, event))

    scored = work.task.kind in ("choice", "perplexity")
    params = engine.resolve({"do_sample": False} if scored else {"do_sample": False, **asked.sampling})
    for index, (ids, _) in enumerate(work.prompts):
        engine.submit(ids, params, listener(index), scoring=_SCORED if scored else None)
    return len(work.prompts)


def judged(task: Task, answer: Answer, scores: Sequence[Sequence[float]]) -> Result:
    """The result of a task.

    Args:
        task: what was asked.
        answer: what was generated.
        scores: log-probabilities of each choice's tokens, or of those of each piece of the text.
    """
    if task.kind == "perplexity":
        return Result(nats=-math.fsum(map(math.fsum, scores)), tokens=sum(map(len, scores)))
    if task.kind == "choice":
        logprobs = tuple(map(math.fsum, scores))
        best = task.choices[logprobs.index(max(logprobs))]
        right = task.choices.index(task.expected[0])
        shares = [math.exp(each - max(logprobs)) for each in logprobs]
        return Result(
            best == task.expected[0], best, logprobs=logprobs, probability=shares[right] / math.fsum(shares)
        )
    matches = MATCHES[task.kind]
    right_one = any(matches(answer.text, each) for each in task.expected)
    return Result(right_one, answer.text, answer.finish_reason, tokens=answer.completion_tokens)
