"""A model folder, opened: session, tokenizer, chat template and generation defaults in one object.

import qrun

model = qrun.open("./Qwen2.5-1.5B-Instruct-onnx-int8")

for event in model.generate("Once upon a time", max_tokens=64, temperature=0.8, seed=1):
    if isinstance(event, qrun.Piece):
        print(event.text, end="", flush=True)

*_, answer = model.generate("1, 2, 3,", max_tokens=8)      # the last event is the whole answer
print(answer.text, answer.finish_reason, f"{answer.decode_tokens_per_second:.1f} tokens/s")

chat = model.chat(system="Answer in one word.")
*_, answer = chat.send("What is the capital of France?")
*_, answer = chat.send("And of Italy?")                    # only the new tokens are prefilled
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.answer import Answering, Event
from qrun.backends.opening import Opening, open_session
from qrun.backends.session import Session
from qrun.backends.token_ids import as_token_ids
from qrun.chat import Chat, template_of
from qrun.decoding.draft import Draft
from qrun.decoding.generate import Context, check_prompt
from qrun.folder.manifest import Manifest, find_model_folder
from qrun.sampling.constraint import Constraint, Grammars, Schema, Vocabulary
from qrun.sampling.params import SamplingParams, resolve
from qrun.text.chat_template import ChatTemplate
from qrun.text.literal import Literal
from qrun.text.tokenizer import Tokenizer, read_json_object, read_tokenizer_config

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Model:
    """Everything that is needed to go from text to text.

    Attributes:
        session: runs token ids.
        tokenizer: the checkpoint's own.
        template: the checkpoint's chat template, or None if it has none (a base model).
        generation_config: the checkpoint's sampling defaults, in transformers' names; may be empty.
        literal: whether special tokens that are written out in messages stay text in ``chat_prompt``.
        even_steps: whether an engine's steps have an even number of rows (see ``Slots``), which costs one row
            at most and gives int4 in long blocks the same answers in any company.
        speculate: whether new contexts try several tokens in one step where the text repeats itself.
        draft: whose guesses they try in one step; see ``use_draft``.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.template = template
        self.generation_config = generation_config or {}
        self.literal = False
        self.speculate = False
        self.draft: Draft | None = None
        self.even_steps = False
        self._grammars = Grammars(self._vocabulary)

    @classmethod
    def open(cls, path: str | Path, *, chat_template: str | None = None, **options: Unpack[Opening]) -> Model:
        """Open a model folder, or the .onnx or .plan inside one.

        Args:
            path: what ``qconvert export`` or ``qconvert build`` wrote.
            chat_template: the name of one of the model's templates, where it has several.
            options: device, threads, check_hashes, prefill_graph, cuda_graph: see ``Opening``.

        Raises:
            QrunError: the folder is not whole, not ours or too new, has no tokenizer, or the device
                cannot run it; no chat template has this name; or a default of generation_config.json is bad.
        """
        folder = find_model_folder(path)
        session = open_session(path, **options)
        template = folder_template(folder, chat_template)
        model = cls(
            session,
            Tokenizer.from_folder(folder),
            template,
            read_json_object(folder / "generation_config.json"),
        )
        model.resolve({})  # somebody may have edited the defaults since they were verified
        return model

    @property
    def manifest(self) -> Manifest:
        return self.session.manifest

    @property
    def device(self) -> str:
        """Where it really runs, for people: "CPU, 2 threads"."""
        return self.session.device

    def resolve(self, sampling: Mapping[str, Any]) -> tuple[SamplingParams, dict[str, str]]:
        """Every sampling parameter of a request, and where its value came from.

        Raises:
            QrunError: an unknown parameter or a bad value, by name.
        """
        ends = self.manifest.eos_token_ids
        return resolve(sampling, self.generation_config, eos_token_ids=ends)

    def new_context(self) -> Context:
        """An empty KV cache. Prompts that are given the same one share their common beginning."""
        return Context(self.session, speculate=self.speculate, draft=self.draft)

    def use_draft(self, path: str | Path, **options: Unpack[Opening]) -> None:
        """From now on a smaller model guesses tokens for new contexts, which are tried several in one step.

        An answer does not depend on what is guessed, but for the last bits of logits, as with ``speculate``.

        Args:
            path: the draft's folder, or the .onnx in it. Its tokenizer is the same as this model's.
            options: how it is opened, see ``Opening``.

        Raises:
            QrunError: it is a plan, it has another vocabulary, or it cannot be opened.
        """
        self.draft = Draft.open(path, self.manifest.folder, **options)

    def constraint(
        self, *, schema: Schema | None = None, regex: str | None = None, grammar: str | None = None
    ) -> Constraint | None:
        """What an answer must fit, for ``answering`` and ``Engine.submit``; see ``Grammars.constraint``."""
        return self._grammars.constraint(schema=schema, regex=regex, grammar=grammar)

    def _vocabulary(self) -> Vocabulary:
        size = max(self.manifest.model.vocab_size, self.tokenizer.id_limit)
        return Vocabulary(self.tokenizer.to_json(), size, self.resolve({})[0].eos_token_ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        context: Context | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        literal: bool = False,
        **sampling: Any,
    ) -> Generator[Event, None, None]:
        """Continue a prompt as it is, without the chat template (for that, see ``chat``).

        Args:
            prompt: text, or token ids: a list, an array, a tensor.
            context: where the tokens go. With the context of an earlier prompt, the tokens that
                both begin with are not computed again. One answer at a time may use it.
            schema: a JSON schema that the answer fits, unless max_tokens or a stop string cuts it off.
            regex: a regular expression that the whole answer matches.
            grammar: a grammar in Lark's notation.
            literal: special tokens that are written out in the prompt stay text.
            sampling: fields of ``SamplingParams``: max_tokens, temperature, top_p, stop, seed, ...

        Returns:
            ``Prefilled`` for progress through the prompt, ``Piece`` for text, ``Answer`` at the end.
            Leave the loop to stop early.

        Raises:
            QrunError: an empty prompt, one longer than the context, a bad sampling parameter, a schema,
                expression or grammar that cannot be enforced.
        """
        params, _ = self.resolve(sampling)
        ids = self.plain_prompt(prompt, literal=literal) if isinstance(prompt, str) else as_token_ids(prompt)
        check_prompt(ids, self.manifest.model.context_length)
        constraint = self.constraint(schema=schema, regex=regex, grammar=grammar)
        return self.answering(ids, params, context=context, constraint=constraint).events()

    def answering(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        context: Context | None = None,
        constraint: Constraint | None = None,
    ) -> Answering:
        """The answer to a prompt as an object that can be cancelled; see ``generate``."""
        return Answering(context or self.new_context(), self.tokenizer, prompt_ids, params, constraint)

    def plain_prompt(self, text: str, *, literal: bool | None = None) -> list[int]:
        """The token ids of a prompt that is continued as it is.

        Args:
            text: the prompt.
            literal: special tokens that are written out in it stay text. By default as ``literal`` of this
                model says.

        Raises:
            QrunError: it is not Unicode text.
        """
        if not (self.literal if literal is None else literal):
            return self.tokenizer.encode(text, add_special_tokens=True)
        as_text = Literal(self.tokenizer)
        return as_text.encode(as_text.mask(text), add_special_tokens=True)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        literal: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Messages with "role" and "content" as the token ids of a prompt, by the model's chat template.

        Args:
            messages: all turns so far.
            tools: see ``ChatTemplate.render``.
            literal: special tokens that are written out in messages and tools stay text. By default as
                ``literal`` of this model says.
            variables: what else the template reads, such as ``{"enable_thinking": False}``.

        Raises:
            QrunError: the model has no chat template, it refuses these messages, or knows no such variable.
        """
        template = template_of(self).given(variables or {})
        if not (self.literal if literal is None else literal):
            return self.tokenizer.encode(template.render(messages, tools=tools))
        as_text = Literal(self.tokenizer)
        given = None if tools is None else as_text.mask_tools(tools)
        return as_text.encode(template.render(as_text.mask_all(messages), tools=given))

    def chat(
        self,
        system: str | None = None,
        *,
        literal: bool = False,
        variables: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Chat:
        """A conversation of several turns, see ``chat.Chat``.

        Raises:
            QrunError: the model has no chat template, it knows none of ``variables``, or a bad sampling
                parameter.
        """
        return Chat(self, system, literal=literal, variables=variables, **sampling)


def folder_template(folder: Path, name: str | None = None) -> ChatTemplate | None:
    """The chat template of a model folder, by its name where it has several; None where there is none."""
    has_one = (folder / "chat_template.jinja").is_file() or (
        read_tokenizer_config(folder).get("chat_template") is not None
    )
    if name is None:
        return ChatTemplate.from_folder(folder) if has_one else None
    return ChatTemplate.from_folder(folder).named(name)
