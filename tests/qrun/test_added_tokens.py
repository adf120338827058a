"""If these fail, a token that stands beside tokenizer.json is several tokens here and one in transformers."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from qrun.errors import QrunError
from qrun.text.tokenizer import Tokenizer
from tests.tiny import write_tiny_tokenizer


def token(content: str, **flags: bool) -> dict[str, object]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


BASE = {"256": token("<|endoftext|>"), "257": token("<|im_start|>"), "258": token("<|im_end|>")}


def decoder(**more: dict[str, object]) -> dict[str, object]:
    return {"added_tokens_decoder": BASE | {number.strip("_"): entry for number, entry in more.items()}}


# What stands in tokenizer_config.json (or in the named file) beyond the tiny tokenizer's own.
CONFIGS = {
    "two more": decoder(_259=token("<tool>", special=False), _260=token("<|x|>")),
    "a gap": decoder(_262=token("<gap>")),
    "not in order": decoder(_265=token("<a>", special=False), _259=token("<b>")),
    "as numbers, not as letters": decoder(_1000=token("<r1>"), _259=token("<r2>"), _30=token("<r3>")),
    "with spaces": decoder(_259=token("<ls>", lstrip=True, rstrip=True)),
    "a single word": decoder(_259=token("word", single_word=True, special=False, normalized=True)),
    "other flags for one that is there": decoder(_258=token("<|im_end|>", lstrip=True)),
    "one of the vocabulary": decoder(_64=token("a", special=False)),
    "another id for one that is there": decoder(_300=token("<|im_end|>")),
    "an end token that is not special": decoder(_259=token("<end>", special=False)) | {"eos_token": "<end>"},
    "a name without a token": {"pad_token": "<new pad>"},
    "a name with flags": {"mask_token": token("<m>", lstrip=True) | {"__type": "AddedToken"}},
    "more special tokens": {"additional_special_tokens": ["<add1>", "<|im_start|>"]},
    "special tokens with names": {"extra_special_tokens": {"image_token": "<img>"}},
    "special tokens in a list": {"extra_special_tokens": ["<e1>"]},
    "added_tokens.json": {"<from added>": 259, "<|im_end|>": 258},
    "special_tokens_map.json": {"pad_token": "<p2>", "additional_special_tokens": ["<as>"]},
}
TEXT = (
    "x <tool> y<|x|> <gap> <b><a> <r1><r2><r3>  <ls>  z word sword wordy a<|im_end|> Ab <end> <new pad> "
    "  <m> <add1><img> <e1><from added> <p2><as><|endoftext|>"
)


@pytest.mark.parametrize("case", CONFIGS)
def test_every_token_has_the_id_that_it_has_in_transformers(case, tmp_path):
    write_tiny_tokenizer(tmp_path)
    name = case if case.endswith(".json") else "tokenizer_config.json"
    path = tmp_path / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | CONFIGS[case]))
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.encode(TEXT, add_special_tokens=False)
    assert ours.encode(TEXT) == ids
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "wrong", [7, ["<a>"], {"259": "<a>"}, {"x": token("<a>")}, {"259": {"content": 3}}, {"259": None}]
)
def test_a_table_of_tokens_that_is_none_is_refused_by_name(wrong, tmp_path):
    write_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": wrong}))
    with pytest.raises(QrunError, match=r'"added_tokens_decoder" (is|has the entry)') as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.where == str(path)
