"""``tokenizer.ggml.*`` as tokenizer.json, for byte-level vocabularies.

The file names the way in which text is cut before it is encoded, and no more; what the name means is in
llama.cpp (``llama-vocab.cpp``). ``_CUTS`` has those of our families.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import numpy as np

from qconvert.checkpoint.gguf.metadata import Fields
from qconvert.errors import QconvertError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# By tokenizer.ggml.pre: the expressions that cut a text, one after the other.
_CUTS: dict[str, tuple[str, ...]] = {
    "qwen2": (_WORDS % "",),
    "llama-bpe": (_WORDS % "{1,3}",),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_IGNORE_MERGES = ("llama-bpe",)  # a word that is a token is that token, whatever the merges say
_BOS_BY_DEFAULT = ("llama-bpe",)
_NORMALISED = ("qwen2",)
_PADDING = re.compile(r"\[PAD\d+\]")
# Tokens that end an answer by their names, as llama.cpp has it, beside those that the metadata names.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_END_KEYS = ("eos", "eot", "eom")
_REMEDY = "get the original checkpoint, which has a tokenizer.json"


class Vocabulary:
    """The tokens of one file.

    Args:
        fields: the file's entries.

    Raises:
        QconvertError: there is no vocabulary, it is of another kind, or its parts do not fit one another.
    """

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        kind = fields.text("tokenizer.ggml.model")
        if kind != "gpt2":
            what = "SentencePiece" if kind == "llama" else f"of the kind {kind}"
            self._refuse(f"its tokenizer is {what}, and byte-level ones (gpt2) are read")
        self.tokens = self._strings("tokenizer.ggml.tokens")
        self.types = self._types()
        self.ids = {
            token: token_id for token_id, token in enumerate(self.tokens) if not self._is_padding(token_id)
        }
        used = sum(not self._is_padding(token_id) for token_id in range(len(self.tokens)))
        if len(self.ids) != used:
            self._refuse("two of its tokens are the same")
        self.pre = self._pre()

    def tokenizer_json(self) -> dict[str, Any]:
        """What tokenizer.json holds."""
        split = [
            {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
            for cut in _CUTS[self.pre]
        ]
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": token_id,
                    "content": self.tokens[token_id],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": self.types[token_id] == _CONTROL,
                }
                for token_id in self._of_types(_CONTROL, _USER_DEFINED)
            ],
            "normalizer": {"type": "NFC"} if self.pre in _NORMALISED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, bytes_of]},
            "post_processor": self._post_processor(bytes_of),
            "decoder": bytes_of,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.pre in _IGNORE_MERGES,
                "vocab": self.ids,
                "merges": self._merges(),
            },
        }

    def tokenizer_config(self, context: int) -> dict[str, Any]:
        """What tokenizer_config.json holds, the template apart."""
        names = (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
        found = {name: self._named(key) for name, key in names}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: None if token_id is None else self.tokens[token_id] for name, token_id in found.items()},
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        }

    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        named = [token_id for key in _END_KEYS if (token_id := self._named(key)) is not None]
        by_name = [
            self.ids[text] for text in _ENDS if text in self.ids and self.types[self.ids[text]] == _CONTROL
        ]
        return list(dict.fromkeys([*named, *by_name]))

    def _named(self, key: str) -> int | None:
        name = f"tokenizer.ggml.{key}_token_id"
        token_id = self._fields.number(name)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            self._fields.refuse(name, token_id, f"it has {len(self.tokens):,} tokens")
        return None if token_id is None else int(token_id)

    def _pre(self) -> str:
        found = self._fields.text("tokenizer.ggml.pre") or "default"
        found = _SAME.get(found, found)
        if found not in _CUTS:
            known = ", ".join(sorted({*_CUTS, *_SAME}))
            self._refuse(f"it cuts texts by the rule {found!r:.40}, and these are known: {known}")
        return found

    def _types(self) -> list[int]:
        value = self._fields.entries.get("tokenizer.ggml.token_type")
        if value is None:
            return [_NORMAL] * len(self.tokens)
        if (
            not isinstance(value, np.ndarray)
            or value.dtype.kind not in "iu"
            or len(value) != len(self.tokens)
        ):
            self._refuse("tokenizer.ggml.token_type does not give a number for each token")
        return [int(each) for each in value]

    def _strings(self, key: str) -> list[str]:
        value = self._fields.entries.get(key)
        if not isinstance(value, list) or not value:
            self._refuse(f"{key} is not there")
        try:
            return [each.decode("utf-8") for each in value]
        except UnicodeDecodeError:
            self._refuse(f"{key} holds what is no text")

    def _merges(self) -> list[list[str]]:
        found = []
        for merge in self._strings("tokenizer.ggml.merges"):
            parts = merge.split(" ")
            if len(parts) != 2 or not {parts[0], parts[1], "".join(parts)} <= self.ids.keys():
                self._refuse(f"the merge {merge!r:.40} is none of its tokens")
            found.append(parts)
        return found

    def _post_processor(self, bytes_of: dict[str, Any]) -> dict[str, Any]:
        value = self._fields.entries.get("tokenizer.ggml.add_bos_token")
        bos = self._named("bos")
        if not (self.pre in _BOS_BY_DEFAULT if value is None else value is True) or bos is None:
            return bytes_of
        text = self.tokens[bos]
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        first = {"SpecialToken": {"id": text, "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        template = {
            "type": "TemplateProcessing",
            "single": [first, sequence],
            "pair": [first, sequence, {"SpecialToken": {"id": text, "type_id": 1}}, second],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
        }
        return {"type": "Sequence", "processors": [bytes_of, template]}

    def _of_types(self, *types: int) -> list[int]:
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]

    def _is_padding(self, token_id: int) -> bool:
        """What a converter fills the vocabulary up with, to as many tokens as the embedding has rows."""
        return self.types[token_id] == _UNUSED or bool(_PADDING.fullmatch(self.tokens[token_id]))

    def _refuse(self, what: str) -> NoReturn:
        raise QconvertError(
            f"No tokenizer can be made of {self._fields.path.name}: {what}.",
            where=self._fields.path,
            hint=_REMEDY,
        )
