"""A conversation: messages, their rendering by the chat template, and one KV cache for all turns."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from qrun.answer import Answer, Answering, Event
from qrun.decoding.generate import Context
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest
from qrun.sampling.constraint import Constraint, Schema
from qrun.sampling.params import SamplingParams
from qrun.text.chat_template import ChatTemplate
from qrun.text.literal import Literal
from qrun.text.tokenizer import Tokenizer


class Speaker(Protocol):
    """What a conversation needs of a model; ``model.Model`` provides it."""

    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def manifest(self) -> Manifest: ...

    @property
    def device(self) -> str: ...

    def resolve(self, sampling: Mapping[str, Any]) -> tuple[SamplingParams, dict[str, str]]: ...

    def new_context(self) -> Context: ...

    def constraint(
        self, *, schema: Schema | None = None, regex: str | None = None, grammar: str | None = None
    ) -> Constraint | None: ...

    def answering(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        context: Context | None = None,
        constraint: Constraint | None = None,
    ) -> Answering: ...


def template_of(model: Speaker) -> ChatTemplate:
    """The model's chat template.

    Raises:
        QrunError: it has none.
    """
    if model.template is None:
        raise QrunError(
            f"{model.manifest.name} has no chat template: it continues text, it does not chat",
            where=model.manifest.folder,
            hint="give it a plain prompt (in a shell `qrun generate --raw`), or put the model's "
            "chat_template.jinja into the checkpoint and export it again",
        )
    return model.template


class Chat:
    """Several turns with one model; the keys and values of earlier turns are kept.

    The prompt of a turn is the rendering of all messages so far. Where it begins with the last
    prompt and answer, only what comes after them is encoded, so the answer keeps the very tokens
    that were generated (encoding its text may give others) and only new tokens are prefilled. A
    template that rewrites earlier turns (to drop their reasoning, say) is followed: the tokens from
    the first difference on are computed again.

        chat = model.chat(system="Be brief.")
        for event in chat.send("What is the capital of France?"):
            if isinstance(event, qrun.Piece):
                print(event.text, end="", flush=True)

    Attributes:
        messages: user and assistant turns, as dicts with "role" and "content".
        answers: one per turn that came to an end or was cancelled, with its token counts and times.

    Args:
        model: with a chat template.
        system: the system message; None leaves it to the template.
        literal: special tokens that are written out in a message stay text: nobody ends a turn by typing
            ``<|im_end|>``.
        variables: what else the chat template reads, such as ``{"enable_thinking": False}``.
        sampling: for every turn, fields of ``SamplingParams``.

    Raises:
        QrunError: the model has no chat template, it knows no such variable, or a bad sampling parameter.
    """

    def __init__(
        self,
        model: Speaker,
        system: str | None = None,
        *,
        literal: bool = False,
        variables: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        self._template = template_of(model).given(variables or {})
        _check_text(system, "the system message", or_none=True)
        model.resolve(sampling)  # a bad value is refused now, not at the first turn
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.answers: list[Answer] = []
        self.context = model.new_context()
        self._system = system
        self._literal = Literal(model.tokenizer) if literal else None
        self._sampling = sampling
        # Renderings whose token ids are known, the longest last: the last prompt, and prompt and answer.
        self._known: list[tuple[str, list[int]]] = []
        self._answering: Answering | None = None
        self._turn: Generator[Event, None, None] | None = None

    @property
    def system_message(self) -> str | None:
        """The system message in force; None leaves it to the template."""
        return self._system

    def system(self, text: str | None) -> None:
        """Change the system message. Turns so far stay; the next one computes all of them again."""
        _check_text(text, "the system message", or_none=True)
        self._system = text

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._end_running_turn()
        self.messages.clear()
        self.answers.clear()
        self._known.clear()
        self.context.reuse([])

    def cancel(self) -> None:
        """End the running answer after the step it is at; its ``Answer`` says "cancelled".

        A signal handler or another thread may call it. Without a running answer it does nothing.
        """
        if self._answering is not None:
            self._answering.cancel()

    def send(
        self,
        text: str,
        *,
        schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        **overrides: Any,
    ) -> Generator[Event, None, None]:
        """Say something and get the events of the answer, the last of them an ``Answer``.

        An answer that is cancelled, or whose loop is left, stays in the conversation as far as it
        went; if it had not begun, the turn is forgotten. So is a turn that raises before that.

        Args:
            text: the user's message.
            schema, regex, grammar: what this answer must fit, see ``Model.generate``.
            overrides: fields of ``SamplingParams`` for this turn only.

        Raises:
            QrunError: an empty message, a conversation that no longer fits the context, a bad
                sampling parameter.
        """
        self._end_running_turn()
        constraint = self.model.constraint(schema=schema, regex=regex, grammar=grammar)
        self._turn = self._run_turn(text, overrides, constraint)
        return self._turn

    def _run_turn(
        self, text: str, overrides: dict[str, Any], constraint: Constraint | None
    ) -> Generator[Event, None, None]:
        params, _ = self.model.resolve({**self._sampling, **overrides})
        user = {"role": "user", "content": text}
        rendered, prompt_ids = self._prompt(user)
        answering = self.model.answering(prompt_ids, params, context=self.context, constraint=constraint)
        self._answering = answering
        try:
            for event in answering.events():
                if isinstance(event, Answer) and _has_begun(answering):
                    self.answers.append(event)
                yield event
        finally:
            self._answering = None
            if _has_begun(answering):
                self._remember(user, answering, rendered, prompt_ids)

    def _prompt(self, user: dict[str, str]) -> tuple[str, list[int]]:
        """The conversation with one more message: as text, and as token ids."""
        _check_text(user["content"], "the message")
        if not user["content"].strip():
            raise QrunError("the message is empty", hint="say something")
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages = [*system, *self.messages, user]
        if self._literal is not None:
            messages = self._literal.mask_all(messages)
        rendered = self._template.render(messages)
        known_text, known_ids = next(
            (known for known in reversed(self._known) if rendered.startswith(known[0])), ("", [])
        )
        ids = known_ids + (self._literal or self.model.tokenizer).encode(rendered[len(known_text) :])
        limit = self.model.manifest.model.context_length
        if len(ids) > limit:
            raise QrunError(
                f"the conversation would have {len(ids):,} tokens, and the context of "
                f"{self.model.manifest.name} ends at {limit:,}",
                hint="start over with /reset, in Python Chat.reset()"
                if self.messages
                else "shorten the message",
            )
        return rendered, ids

    def _remember(
        self, user: dict[str, str], answering: Answering, rendered: str, prompt_ids: list[int]
    ) -> None:
        self.messages += [user, {"role": "assistant", "content": answering.text}]
        self._known = [(rendered, prompt_ids)]
        # A stop string, or half a character at the end, is in the tokens and not in the text.
        if self.model.tokenizer.decode(answering.token_ids) == answering.text:
            text = answering.text if self._literal is None else self._literal.mask(answering.text)
            self._known.append((rendered + text, prompt_ids + answering.token_ids))

    def _end_running_turn(self) -> None:
        """A turn whose loop was left for good ends here at the latest."""
        if self._turn is not None:
            self._turn.close()
            self._turn = None


def _has_begun(answering: Answering) -> bool:
    """Whether there is an answer to keep: not one that was cancelled before it had any text."""
    return bool(answering.text) or answering.finish_reason not in (None, "cancelled")


def _check_text(value: object, what: str, *, or_none: bool = False) -> None:
    if not (isinstance(value, str) or (or_none and value is None)):
        raise QrunError(
            f"{what} must be text, not {value!r:.60}",
            hint='of a message as other programs have it, give what is under its "content"',
        )
