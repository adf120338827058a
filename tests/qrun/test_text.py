"""If these fail, a reader sees half a character, part of a stop string, or other text than decode gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrun.text.streaming import IncrementalDetokenizer, StopStrings
from qrun.text.tokenizer import Tokenizer
from tests.assets import qwen_tokenizer_folder
from tests.tiny import write_tiny_tokenizer

END_OF_TEXT = 256  # the tiny tokenizer's special token; its ids 0 to 255 are single bytes
SCRIPTS = {
    "latin": "Naïve café, “quotes” — don't",
    "chinese": "法国的首都是巴黎。你好，世界！",
    "rare ideographs": "𠮷野家と𩸽",
    "arabic": "مرحبا بالعالم",
    "devanagari": "नमस्ते दुनिया",
    "korean": "안녕하세요 세계",
    "emoji": "🙂🚀 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷",
    "replacement character": "broken \ufffd here\ufffd",
    "code": "def f(x):\n\treturn {'a': x[0] ** 2}  # ok\n",
}
LETTERS = st.sampled_from(sorted({letter for text in SCRIPTS.values() for letter in text}))
TEXTS = st.lists(LETTERS, max_size=60).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=40
)


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.from_folder(qwen_tokenizer_folder())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    """One token per byte: every character beyond ASCII is cut in all its places."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def pieces(tokenizer: Tokenizer, token_ids: list[int], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The tiny tokenizer's ids of any bytes, not only of valid UTF-8."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ids = [tokenizer.token_id(letters[byte]) for byte in data]
    assert None not in ids
    return ids


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("name", ["qwen", "tiny"])
def test_streams_every_script_whole(name, text, request):
    tokenizer = request.getfixturevalue(name)
    streamed = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(streamed) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in streamed)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_random_texts_come_out_as_they_went_in(qwen, tiny, text):
    for tokenizer in (qwen, tiny):
        ids = tokenizer.encode(text)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 152_000), max_size=80), skip=st.booleans())
def test_random_tokens_give_what_decode_gives(qwen, ids, skip):
    """Ids beyond the vocabulary are among them: a model's logits are padded beyond its tokens."""
    streamed = "".join(pieces(qwen, ids, skip_special_tokens=skip))
    assert streamed == qwen.decode(ids, skip_special_tokens=skip)


# Starts and middles of characters, bytes that never occur in UTF-8, and some that stand alone.
AWKWARD_BYTES = st.sampled_from(
    [0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xED, 0xF0, 0x9F, 0x99, 0x82, 0xFF]
)


@settings(deadline=None, max_examples=400)
@given(
    data=st.lists(AWKWARD_BYTES | st.integers(0, 255), max_size=80).map(bytes),
    specials=st.lists(st.integers(0, 80), max_size=5),
    skip=st.booleans(),
)
def test_broken_bytes_give_what_decode_gives(tiny, data, specials, skip):
    ids = byte_ids(tiny, data)
    for place in specials:
        ids.insert(place, END_OF_TEXT)
    assert "".join(pieces(tiny, ids, skip_special_tokens=skip)) == tiny.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("before", range(10))
def test_an_unreadable_run_is_never_let_go_amid_a_character(tiny, before):
    """A cut inside F0 9F 99 would show one broken character as two."""
    ids = byte_ids(tiny, b"\xff" * before + b"\xf0\x9f\x99" + b"\xff" * 10 + "🙂".encode())
    assert "".join(pieces(tiny, ids)) == tiny.decode(ids)


def test_tokens_without_text_do_not_cut_a_character(tiny):
    import tokenizers

    first, second = (tiny.token(token_id) for token_id in tiny.encode("é"))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={first: 0, second: 1, "": 2}, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    assert "".join(pieces(Tokenizer(backend, {}), [0, *[2] * 20, 1])) == "é"


def test_an_emoji_comes_with_its_last_token(tiny):
    assert pieces(tiny, tiny.encode("a🙂b")) == ["a", "", "", "", "🙂", "b", ""]


def test_a_joined_emoji_comes_person_by_person(tiny):
    """Characters are whole; a cluster of them is not waited for, since it has no known end."""
    shown = [piece for piece in pieces(tiny, tiny.encode("👩\u200d🚀")) if piece]
    assert shown == ["👩", "\u200d", "🚀"]


def test_half_a_character_shows_only_at_the_end(tiny):
    ids = tiny.encode("é")[:1]
    assert pieces(tiny, ids) == ["", "\ufffd"]


def test_a_special_token_amid_a_character_does_not_cut_it(tiny):
    """decode() drops special tokens before it joins the bytes; a stream must agree with it."""
    first, second = tiny.encode("é")
    assert "".join(pieces(tiny, [first, END_OF_TEXT, second])) == "é"


def test_special_tokens_on_request(tiny):
    assert pieces(tiny, [END_OF_TEXT], skip_special_tokens=False) == ["<|endoftext|>", ""]


def test_decoders_that_look_at_the_left_neighbour():
    """A Metaspace decoder drops the first token's space only: a token decoded alone would lose its own."""
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"▁to": 0, "▁be": 1, "▁or": 2}, unk_token="▁or")
    )
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend, {})
    assert pieces(tokenizer, [0, 1, 2, 0, 0]) == ["to", " be", " or", " to", " to", ""]


class CountingTokenizer(Tokenizer):
    decoded = 0

    def decode(self, token_ids, skip_special_tokens=True):
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("data", ["word ", "你好", "🙂", b"\xff", b"\xe4", b"\x80A\x80"], ids=repr)
def test_a_long_answer_costs_in_proportion_to_its_length(tmp_path: Path, data):
    """Regression in others: a run of unreadable bytes was decoded from its start at every token."""
    write_tiny_tokenizer(tmp_path)
    tokenizer = CountingTokenizer.from_folder(tmp_path)
    raw = data if isinstance(data, bytes) else data.encode()
    ids = (byte_ids(tokenizer, raw) * 2000)[:2000]
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token_id in ids:
        detokenizer.push(token_id)
    assert tokenizer.decoded <= 40 * len(ids)


@pytest.mark.parametrize("token_id", [END_OF_TEXT, 300], ids=["special", "unknown"])
def test_tokens_without_text_amid_a_character_cost_nothing(tmp_path, token_id):
    write_tiny_tokenizer(tmp_path)
    tokenizer = CountingTokenizer.from_folder(tmp_path)
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.push(tokenizer.encode("é")[0])
    decoded = tokenizer.decoded
    for _ in range(1000):
        assert detokenizer.push(token_id) == ""
    assert tokenizer.decoded == decoded


def test_flush_starts_anew(tiny):
    detokenizer = IncrementalDetokenizer(tiny)
    detokenizer.push(tiny.encode("é")[0])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.push(tiny.encode("x")[0]) == "x"


def stopped(stop: list[str], chunks: list[str]) -> tuple[str, str | None]:
    """The text shown in all, and what ended it."""
    stops = StopStrings(stop)
    shown = ""
    for chunk in chunks:
        text, matched = stops.push(chunk)
        shown += text
        if matched is not None:
            assert stops.flush() == ""
            return shown, matched
    return shown + stops.flush(), None


@pytest.mark.parametrize(
    ("stop", "chunks", "shown", "matched"),
    [
        ([], ["any", "thing"], "anything", None),
        (["END"], ["some END more"], "some ", "END"),
        (["END"], ["some E", "N", "D more"], "some ", "END"),
        (["END"], ["some E", "N", "O"], "some ENO", None),
        (["END"], ["some EN"], "some EN", None),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["abab"], ["aba", "cabab"], "abac", "abab"),
        (["\n\n"], ["line\n", "line\n", "\nrest"], "line\nline", "\n\n"),
        (["c", "abcd"], ["ab", "cd"], "ab", "c"),
        (["bc", "abc"], ["xabc"], "x", "abc"),
        (["终止"], ["开始终", "止结束"], "开始", "终止"),
    ],
)
def test_stop_strings(stop, chunks, shown, matched):
    assert stopped(stop, chunks) == (shown, matched)


def test_no_more_is_held_back_than_could_still_be_a_stop_string():
    stops = StopStrings(["</answer>", "<end>"])
    assert stops.push("a < b") == ("a < b", None)
    assert stops.push(" <") == (" ", None)
    assert stops.push("/ans") == ("", None)
    assert stops.push("x") == ("</ansx", None)


def test_nothing_is_shown_after_the_stop_string():
    stops = StopStrings(["."])
    assert stops.push("a.b") == ("a", ".")
    assert stops.push("c") == ("", ".")
    assert stops.flush() == ""


@settings(deadline=None, max_examples=500)
@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_how_the_text_is_cut_into_tokens_makes_no_difference(text, stop, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:end] for start, end in pairwise(edges)]
    shown, matched = stopped(stop, chunks)
    # Written down again without a stream: where does the first stop string end?
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in stop)]
    if not ends:
        assert (shown, matched) == (text, None)
    else:
        assert matched == max((string for string in stop if text[: ends[0]].endswith(string)), key=len)
        assert shown == text[: ends[0] - len(matched)]
