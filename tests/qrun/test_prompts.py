"""If these fail, an array is no prompt, what is no token id passes, or a BOM is three tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

import qrun as api
from qrun.errors import QrunError
from tests.commands import qrun

IDS = [72, 105, 33]


@pytest.fixture(scope="module")
def model(tiny_export):
    return api.open(tiny_export)


def answer(model, prompt) -> tuple[int, ...]:
    *_, last = model.generate(prompt, max_tokens=4, do_sample=False)
    return last.token_ids


@pytest.mark.parametrize("kind", [tuple, np.array, np.int32, np.uint16, iter])
def test_token_ids_may_come_in_any_sequence_of_whole_numbers(kind, model):
    given = (
        np.array(IDS, dtype=kind) if isinstance(kind, type) and issubclass(kind, np.generic) else kind(IDS)
    )
    assert answer(model, given) == answer(model, IDS)


def test_a_tensor_of_torch_is_taken(model):
    torch = pytest.importorskip("torch")
    assert answer(model, torch.tensor(IDS)) == answer(model, IDS)


@pytest.mark.parametrize(
    "prompt",
    [
        [1.5],
        [True],
        ["72"],
        [None],
        [[72, 105]],
        np.array([1.0, 2.0]),
        np.array([[72, 105]]),
        np.array([True]),
        np.array(72),
        [72, 1.0],
        b"hi",  # the bytes of a text, which are whole numbers too
        bytearray(b"hi"),
        memoryview(b"hi"),
        {72, 105},
        {72: 1},
        [2**70],
    ],
)
def test_what_is_no_list_of_token_ids_is_refused(prompt, model):
    with pytest.raises(QrunError, match="a prompt is text or a list of token ids"):
        model.generate(prompt, max_tokens=1)


@pytest.mark.parametrize("prompt", [[], (), np.array([], dtype=np.int64), ""])
def test_an_empty_prompt_is_refused_before_the_loop(prompt, model):
    with pytest.raises(QrunError, match="the prompt is empty"):
        model.generate(prompt, max_tokens=1)


@pytest.mark.parametrize("prompt", [[320], [-1], np.array([10**12])])
def test_ids_beyond_the_vocabulary_are_refused(prompt, model):
    with pytest.raises(QrunError, match="outside the vocabulary of 320"):
        list(model.generate(prompt, max_tokens=1))


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_a_prompt(tiny_export, tmp_path):
    ask = ("generate", "--engine", tiny_export, "--max-tokens", 1, "--json")
    file = tmp_path / "prompt.txt"
    counts = []
    for text in (b"Hello", BOM + b"Hello"):
        file.write_bytes(text)
        for more, stdin in ((("--prompt-file", file), None), (("--prompt", "-"), text)):
            counts.append(json.loads(qrun(*ask, *more, stdin=stdin).stdout)["prompt_tokens"])
    assert len(set(counts)) == 1


def test_a_byte_order_mark_hides_no_command_of_a_chat(tiny_export):
    done = qrun("chat", "--engine", tiny_export, stdin=BOM + b"/exit\nHello\n")
    assert (done.exit_code, done.stdout) == (0, "")


def test_a_byte_order_mark_is_no_part_of_a_schema_or_a_key(tmp_path):
    from qrun.cli.options import read_schema
    from qrun.serve.keys import read_keys

    file = tmp_path / "file"
    file.write_bytes(BOM + b'{"type": "integer"}')
    assert read_schema(file) == {"type": "integer"}
    file.write_bytes(BOM + b"sk-one\nsk-two\n")
    assert read_keys(file) == ("sk-one", "sk-two")
    file.write_bytes(BOM + b"# ours\nsk-one\n")
    assert read_keys(file) == ("sk-one",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sk-schl\u00fcssel\n".encode(), "the API key in line 1 holds more than ASCII"),
        (b"sk-one\nsk\x00two\n", "the API key in line 2 holds more than ASCII"),
        ("sk-one\n".encode("utf-16"), "not UTF-8"),
        (b" # only a comment\n\n", "holds no API key"),
    ],
)
def test_a_key_that_no_client_could_send_is_refused_and_not_shown(content, words, tmp_path):
    """Such keys were taken, and every request that carried one was then refused."""
    from qrun.errors import QrunError
    from qrun.serve.keys import read_keys

    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(QrunError, match=words) as error:
        read_keys(tmp_path / "keys")
    assert "sk" not in str(error.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("message", [5, None, b"hi", ["hi"], {"role": "user", "content": "hi"}])
def test_a_message_that_is_no_text_is_refused(message, model):
    chat = model.chat(max_tokens=1)
    with pytest.raises(QrunError, match="the message must be text"):
        list(chat.send(message))
    assert chat.messages == []
    if message is not None:  # which leaves the system message to the template
        for set_it in (chat.system, lambda text: model.chat(system=text)):
            with pytest.raises(QrunError, match="the system message must be text"):
                set_it(message)
