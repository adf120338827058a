"""If these fail, an answer does not fit its form, or a form that cannot be enforced is taken in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import qrun
from qrun.errors import QrunError
from tests.fakes import IM_END, VOCAB_SIZE, fake_model, repeating
from tests.qrun.writing import takes, write

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tokenizer):
    """Wants to say "x" for ever."""
    return fake_model(tokenizer, repeating(tokenizer, "x"))


def last(events) -> qrun.Answer:
    *_, answer = events
    return answer


def test_a_sampled_answer_fits_its_schema(model):
    for seed in range(10):
        asked = {"temperature": 50.0, "seed": seed, "top_k": 0, "repetition_penalty": 1.3}
        answer = last(model.generate("hi", schema=PERSON, max_tokens=200, **asked))
        assert answer.finish_reason == "eos"
        found = json.loads(answer.text)
        assert set(found) == {"name", "age"}
        assert found["age"] >= 0


def test_an_answer_ends_where_nothing_more_can_come_without_a_step_for_its_end_token(model):
    answer = last(model.generate("hi", regex="x{3}", max_tokens=10))
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == ("xxx", "eos", 3)


def test_an_end_token_is_allowed_exactly_where_the_answer_is_complete(model):
    constraint = model.constraint(regex="ab?")
    logits = np.zeros(VOCAB_SIZE, np.float32)
    (a,), (b,) = model.tokenizer.encode("a"), model.tokenizer.encode("b")
    assert np.flatnonzero(np.isfinite(constraint.mask(logits, [IM_END]))).tolist() == [a]
    constraint.accept(a)
    assert np.flatnonzero(np.isfinite(constraint.mask(logits, [IM_END]))).tolist() == sorted([b, IM_END])
    assert np.flatnonzero(np.isfinite(constraint.mask(logits, [5]))).tolist() == sorted({b, 5})
    assert np.flatnonzero(np.isfinite(constraint.mask(logits, []))).tolist() == [b]


def test_no_bias_and_no_penalty_brings_back_what_is_ruled_out(model):
    (x,) = model.tokenizer.encode("x")
    answer = last(model.generate("hi", regex="[abc]{9}", logit_bias={x: 100}, presence_penalty=-2.0))
    assert set(answer.text) <= set("abc")


def test_length_and_stop_strings_may_cut_an_answer_off(model):
    assert last(model.generate("hi", schema={"type": "string"}, max_tokens=3)).finish_reason == "length"
    answer = last(model.generate("hi", regex="x+", stop=["xxx"], max_tokens=9))
    assert (answer.text, answer.finish_reason) == ("", "stop")


def test_a_turn_of_a_chat_and_a_grammar(model):
    assert last(model.chat().send("hi", grammar='start: "ye" /x{2}/ "s"')).text == "yexxs"
    assert last(model.chat().send("hi", regex="no|x")).text == "x"


def test_tokens_beyond_the_tokenizers_are_never_chosen(model):
    logits = np.zeros(VOCAB_SIZE + 64, np.float32)
    allowed = np.flatnonzero(np.isfinite(model.constraint(regex=".*").mask(logits, [IM_END])))
    assert allowed.max() <= IM_END
    assert np.isfinite(model.constraint(regex=".*").mask(logits[:100], [IM_END])).sum() > 50


def test_several_answers_do_not_share_how_far_they_have_come(model):
    first = model.constraint(regex="abc")
    first.accept(model.tokenizer.encode("a")[0])
    for other in (model.constraint(regex="abc"), first.fresh()):
        assert takes(other, model.tokenizer.encode("abc"), VOCAB_SIZE)


def test_any_threads_may_ask(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "x"))

    def one(number: int) -> str | None:
        found = model.constraint(schema={"const": f"v{number % 20}"})
        return write(found, tokenizer, IM_END, number, vocab_size=VOCAB_SIZE)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(60))) == [f'"v{number % 20}"' for number in range(60)]


REFUSED = [
    ({"schema": {"not": {}}}, '"not"'),
    ({"schema": {"properties": {"a": {"uniqueItems": True, "if": {}}}}}, '"if", "uniqueItems"'),
    ({"schema": {"items": {"contains": {}}}}, '"contains"'),
    ({"schema": {"type": "string", "format": "iri"}}, "iri"),
    ({"schema": {"oneOf": [{"type": "integer"}, {"minimum": 2}]}}, '"oneOf"'),
    ({"schema": {"type": "string", "pattern": "(?=a)"}}, "look-ahead"),
    ({"schema": {"$ref": "https://example.com/s"}}, "https://example.com/s"),
    ({"schema": {"type": "strin"}}, "strin"),
    ({"schema": {"contentEncoding": "base64"}}, '"contentEncoding"'),
    ({"schema": {"type": "object", "minProperties": 2}}, '"minProperties"'),
    ({"schema": {"$defs": {"a": {"minProperties": 2}}, "$ref": "#/$defs/a"}}, '"minProperties"'),
    # Words that nobody enforces: misspelt ones, those of other drafts and of OpenAPI. All were ignored.
    ({"schema": {"foo": {"type": "null"}, "$ref": "#/foo"}}, '"foo"'),
    ({"schema": {"type": "array", "minitems": 2}}, '"minitems"'),
    ({"schema": {"properties": {"a": {"type": "string", "nullable": True}}}}, '"nullable"'),
    ({"schema": {"$defs": {"a": {"properties": 1, "if": {}}}}}, '"if"'),
    ({"schema": {"divisibleBy": 2}}, '"divisibleBy"'),
    ({"schema": {"disallow": "string"}}, '"disallow"'),
    # llguidance says "NoExtensionBias" to these.
    ({"schema": {"$ref": "#"}}, "leads to nothing but itself"),
    ({"schema": {"anyOf": [{"$ref": "#"}]}}, "leads to nothing but itself"),
    ({"grammar": "start: a\na: start"}, "leads to nothing but itself"),
    ({"schema": {"const": float("nan")}}, "not JSON"),
    ({"schema": {"x-guidance": {"lenient": True}}}, '"x-guidance"'),
    ({"schema": {"const": "a\0b"}}, "control characters"),
    ({"schema": json.loads('{"items":' * 500 + "{}" + "}" * 500)}, "recursion"),
    ({"schema": False}, "no answer fits the schema false"),
    ({"schema": [1]}, "must be a JSON object"),
    ({"schema": {"const": "a" * 300_000}}, "at most"),
    ({"schema": {"const": {1, 2}}}, "not JSON"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": r"a\b"}, "look"),
    ({"regex": 5}, "must be a text"),
    ({"grammar": "start: foo"}, "foo"),
    ({"grammar": 'x: "y"'}, "start"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "nested"),
    ({"grammar": " ".join(['start: "a"'] * 9000)}, "at most"),
    ({"regex": "a", "schema": {}}, "cannot both"),
]


@pytest.mark.parametrize(("asked", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_enforced_is_refused_by_name(model, asked, named):
    with pytest.raises(QrunError) as error:
        model.constraint(**asked)
    assert named in error.value.what
    assert len(str(error.value)) < 700


def test_what_holds_keywords_as_data_is_not_refused(model):
    """A property may be called "not", and a constant may hold anything."""
    schema = {"properties": {"not": {"type": "null"}, "minProperties": {}}, "description": "contentEncoding"}
    assert model.constraint(schema=schema) is not None
    assert model.constraint(schema={"const": {"minProperties": 7}}) is not None
    notes = {"title": "A", "examples": [{"foo": 1}], "x-order": {"foo": 1}, "deprecated": True}
    assert model.constraint(schema={"type": "integer", **notes, "$comment": "none"}) is not None
    union = {"oneOf": [{"type": "integer"}, {"type": "string"}], "discriminator": {"propertyName": "kind"}}
    assert model.constraint(schema=union) is not None
    assert model.constraint() is None


def test_a_key_cannot_hide_from_the_schema_in_escapes(model):
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    constraint = model.constraint(schema=schema)
    assert not takes(constraint, model.tokenizer.encode(r'{"\u0061":"x"}'), VOCAB_SIZE)
    assert takes(constraint, model.tokenizer.encode('{"a":1, "b":"x"}'), VOCAB_SIZE)


def test_blanks_have_an_end(model):
    """A small model would write them to the end of its context."""
    constraint = model.constraint(schema={"type": "array"})
    assert takes(constraint, model.tokenizer.encode("[" + " " * 20 + "]"), VOCAB_SIZE)
    assert not takes(constraint, model.tokenizer.encode("[" + " " * 21 + "]"), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "2021-12-31"], ["2021-02-29", "1900-02-29", "2021-04-31", "x"]),
        ("time", ["23:59:59Z", "00:00:00.5+01:00"], ["23:58:60Z", "24:00:00Z", "12:00"]),
        ("date-time", ["2024-02-29T00:00:00Z"], ["2021-02-29T00:00:00Z", "2021-02-28"]),
    ],
)
def test_a_date_is_one_that_there_is(model, kind, right, wrong):
    """llguidance's own formats take the 29th of February in every year."""
    for schema in ({"format": kind}, {"type": "string", "format": kind, "allOf": [{"minLength": 1}]}):
        constraint = model.constraint(schema=schema)
        for text in right + wrong:
            assert takes(constraint, model.tokenizer.encode(json.dumps(text)), VOCAB_SIZE) == (text in right)
    assert model.constraint(schema={"properties": {"format": {"const": "date"}}}) is not None


def test_ignore_eos_contradicts_a_form(model):
    with pytest.raises(QrunError, match="ignore_eos contradicts"):
        last(model.generate("hi", regex="a", ignore_eos=True))


def test_without_llguidance_the_rest_works_and_a_schema_says_what_to_install(tmp_path, tokenizer):
    program = """
import sys
sys.modules["llguidance"] = None
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "llguidance" else find(name, *rest)
from pathlib import Path
from tests.fakes import fake_model, repeating, tiny_tokenizer
import qrun
tokenizer = tiny_tokenizer(Path(sys.argv[1]))
model = fake_model(tokenizer, repeating(tokenizer, "x"))
*_, answer = model.generate("hi", max_tokens=2)
assert answer.text == "xx"
try:
    model.generate("hi", schema={})
except qrun.QrunError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'qconvert[grammar]'" in done.stdout
