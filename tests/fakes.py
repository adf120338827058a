"""A session without a model: NumPy only, and every token that it is fed is written down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.session import LogitsFor
from qrun.errors import QrunError
from qrun.folder.manifest import MANIFEST_NAME, Manifest, read_manifest
from qrun.model import Model
from qrun.text.chat_template import ChatTemplate
from qrun.text.tokenizer import Tokenizer
from tests.tiny import CHAT_TEMPLATE, write_tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 320
IM_START, IM_END, AB = 257, 258, 259
# A next token by the tokens so far.
Rule = Callable[[list[int]], int]


def fake_manifest(
    *, context_length: int = 256, eos: Sequence[int] = (IM_END,), verification: str = "passed"
) -> Manifest:
    """A manifest as ``read_manifest`` gives it; its folder holds nothing else and is gone."""
    facts = {
        "format": "qconvert-model",
        "format_version": 1,
        "name": "fake",
        "target": "onnxruntime",
        "precision": "fp32",
        "model": {
            "architecture": "Qwen2ForCausalLM",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_size": 16,
            "hidden_size": 64,
            "vocab_size": VOCAB_SIZE,
            "context_length": context_length,
        },
        "graph": {"file": "model.onnx"},
        "kv_cache": {"dtype": "float32", "bytes_per_token": 512},
        "tokens": {"eos": list(eos)},
        "verification": {"status": verification},
        "files": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_NAME).write_text(json.dumps(facts))
        return read_manifest(folder)


class FakeKVCache(KVCache):
    """Holds token ids where a model would hold their keys and values, and marks what was never written."""

    def __init__(
        self, manifest: Manifest, batch: int, *, pool: FakeKVCache | None = None, first: int = 0
    ) -> None:
        super().__init__(manifest, batch, pool=pool, first=first)
        self._first = first
        self._ids = np.full((batch, 0), -1, dtype=np.int64)
        self._scores = np.zeros((batch, 1, VOCAB_SIZE), dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Token ids ``[rows, capacity]``."""
        return self.pool._ids[self._first : self._first + self.batch]

    @property
    def scores(self) -> NDArray[np.float32]:
        """Logits of each row's last token: one buffer, written over at every call, as the protocol allows."""
        return self.pool._scores[self._first : self._first + self.batch]

    def copy_out(self, row: int, start: int, stop: int) -> list[NDArray[np.int64]]:
        assert stop <= self.lengths[row]
        return [self.ids[row, None, start:stop].copy()]

    def copy_in(self, row: int, start: int, states: list[NDArray[np.int64]]) -> None:
        target, length = self.rows(row, 1), states[0].shape[1]
        target.trim(start)
        target.reserve(length)
        target.ids[0, start : start + length] = states[0][0]
        target.advance(length)

    def _reallocate(self, capacity: int) -> None:
        grown = np.full((self.batch, capacity), -1, dtype=np.int64)
        for row, length in enumerate(self.lengths.tolist()):
            grown[row, :length] = self._ids[row, :length]
        self._ids = grown

    def _show(self, first: int, count: int) -> FakeKVCache:
        return FakeKVCache(self.manifest, count, pool=self.pool, first=self._first + first)


class FakeSession:
    """Answers by a rule over what its cache holds, so that a wrong reuse or trim changes the answer.

    Attributes:
        fed: the tokens of each row of each forward call, in order.
    """

    def __init__(self, rule: Rule, manifest: Manifest | None = None, *, last_apart: bool = False) -> None:
        self.manifest = manifest or fake_manifest()
        self.last_apart = last_apart
        self.device = "fake device"
        self.rule = rule
        self.fed: list[list[int]] = []

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> FakeKVCache:
        return FakeKVCache(self.manifest, batch)

    def reads_last_apart(self, new: int) -> bool:
        return self.last_apart and new > 1

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: LogitsFor = "last"
    ) -> NDArray[np.float32]:
        assert isinstance(cache, FakeKVCache)
        batch, new = token_ids.shape
        assert batch == cache.batch
        assert batch == 1 or new == 1, "several tokens for several rows"
        if not (token_ids.min() >= 0 and token_ids.max() < VOCAB_SIZE):
            raise QrunError(f"token id {token_ids.max()} is outside the vocabulary of {VOCAB_SIZE}")
        cache.reserve(new)
        for row, start in enumerate(cache.lengths.tolist()):
            cache.ids[row, start : start + new] = token_ids[row]
            self.fed.append(token_ids[row].tolist())
        cache.advance(new)
        positions = {"last": 1, "all": new, "none": 0}[logits]
        scores = cache.scores if logits == "last" else np.zeros((batch, positions, VOCAB_SIZE), np.float32)
        scores[...] = 0
        for row, length in enumerate(cache.lengths.tolist()):
            for index in range(positions):
                seen = cache.ids[row, : length - positions + index + 1].tolist()
                assert -1 not in seen, "a place in the cache that nobody has written"
                scores[row, index, self.rule(seen)] = 10.0
        return scores


def scripted(tokenizer: Tokenizer, answers: Sequence[str | list[int]]) -> Rule:
    """Gives the n-th answer to the n-th ``<|im_start|>assistant``, and ends it with <|im_end|>.

    An answer is a text, or token ids where its tokens matter.
    """
    header = tokenizer.encode("<|im_start|>assistant\n")
    scripts = [tokenizer.encode(text) if isinstance(text, str) else text for text in answers]

    def rule(seen: list[int]) -> int:
        starts = [i for i in range(len(seen)) if seen[i : i + len(header)] == header]
        written = seen[starts[-1] + len(header) :]
        answer = [*scripts[len(starts) - 1], IM_END]
        assert written == answer[: len(written)], "the cache holds another answer than the one given"
        return answer[len(written)]

    return rule


def repeating(tokenizer: Tokenizer, text: str) -> Rule:
    """Says ``text`` for ever, whatever the prompt: the place in it follows from the number of tokens."""
    ids = tokenizer.encode(text)
    return lambda seen: ids[len(seen) % len(ids)]


def write_merging_tokenizer(folder: Path) -> None:
    """The tiny tokenizer with one merge, "ab", so that a text has several encodings."""
    write_tiny_tokenizer(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["ab"] = AB
    content["model"]["merges"] = [["a", "b"]]
    path.write_text(json.dumps(content))


def tiny_tokenizer(folder: Path, *, merging: bool = False) -> Tokenizer:
    (write_merging_tokenizer if merging else write_tiny_tokenizer)(folder)
    return Tokenizer.from_folder(folder)


def fake_model(
    tokenizer: Tokenizer,
    rule: Rule,
    *,
    manifest: Manifest | None = None,
    template: str | None = CHAT_TEMPLATE,
    generation_config: Mapping[str, Any] | None = None,
) -> Model:
    """A ``Model`` over a fake session; its ``session.fed`` tells what was computed."""
    chat_template = None
    if template is not None:
        chat_template = ChatTemplate({"default": template}, {})
        chat_template.source = template  # from which tests/ray makes it again in another process
    return Model(FakeSession(rule, manifest), tokenizer, chat_template, generation_config)


def fed_tokens(model: Model) -> int:
    """Tokens that the fake session has computed since the last call."""
    session = model.session
    assert isinstance(session, FakeSession)
    count = sum(map(len, session.fed))
    session.fed.clear()
    return count
