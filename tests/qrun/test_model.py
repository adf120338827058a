"""If these fail, the text that a caller of the Python API gets is not what the model said."""

from __future__ import annotations

import json

import pytest

import qrun
from qrun.decoding.generate import PREFILL_CHUNK
from qrun.errors import QrunError
from tests.fakes import AB, IM_END, fake_manifest, fake_model, fed_tokens, repeating


def saying(tokenizer, text: str, **options):
    """A model that continues the prompt ">" with ``text`` and an end token."""
    script = [*tokenizer.encode(text), IM_END]
    return fake_model(tokenizer, lambda seen: script[len(seen) - 1], **options)


def pieces(events) -> list[str]:
    return [event.text for event in events if isinstance(event, qrun.Piece)]


def test_pieces_make_the_text_and_the_last_event_tells_everything(tokenizer):
    *events, answer = saying(tokenizer, "hello").generate(">")
    assert pieces(events) == list("hello")
    assert isinstance(answer, qrun.Answer)
    assert answer.text == "hello"
    assert list(answer.token_ids) == tokenizer.encode("hello")
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("eos", 1, 5)
    assert answer.to_json()["token_ids"] == list(answer.token_ids)
    json.dumps(answer.to_json())


def test_a_character_of_several_tokens_comes_in_one_piece(tokenizer):
    *events, answer = saying(tokenizer, "é🙂你").generate(">")
    assert pieces(events) == ["é", "🙂", "你"]
    assert answer.completion_tokens == 9


def test_half_a_character_at_the_end_is_told_as_such(tokenizer):
    *events, answer = saying(tokenizer, "a🙂").generate(">", max_tokens=3)
    assert "".join(pieces(events)) == answer.text == "a\ufffd"


@pytest.mark.parametrize("stop", ["END", ["zzz", "END"], ("END", "D!")])
def test_a_stop_string_across_tokens_ends_the_answer_and_never_shows(tokenizer, stop):
    model = saying(tokenizer, "one END! two")
    *events, answer = model.generate(">", stop=stop)
    assert "".join(pieces(events)) == answer.text == "one "
    assert answer.finish_reason == "stop"
    assert fed_tokens(model) == len(">one EN"), "the model went on after the stop string"


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end(tokenizer):
    *events, answer = saying(tokenizer, "one EN").generate(">", stop="END")
    assert "".join(pieces(events)) == answer.text == "one EN"
    assert answer.finish_reason == "eos"


def test_end_tokens_of_the_generation_config_count_too(tokenizer):
    colon = tokenizer.encode(":")[0]
    model = saying(tokenizer, "yes: no", generation_config={"eos_token_id": [colon]})
    *_, answer = model.generate(">")
    assert (answer.text, answer.finish_reason) == ("yes", "eos")


def test_a_prompt_may_be_token_ids(tokenizer):
    *_, answer = saying(tokenizer, "ok").generate(tokenizer.encode(">"))
    assert answer.text == "ok"


def test_special_tokens_in_a_prompt_are_understood(tokenizer):
    model = saying(tokenizer, "ok")
    *_, answer = model.generate("<|im_start|>")
    assert answer.prompt_tokens == 1


def test_each_prompt_starts_afresh_unless_it_is_given_a_context(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "abc"))
    for _ in range(2):
        *_, answer = model.generate("Once upon a time", max_tokens=1)
        assert answer.reused_tokens == 0
    context = model.new_context()
    list(model.generate("Once upon a time", max_tokens=1, context=context))
    *_, answer = model.generate("Once upon a mouse", max_tokens=1, context=context)
    assert answer.reused_tokens == len("Once upon a ")


def test_two_answers_at_once_do_not_disturb_each_other(tokenizer):
    """Two prompts and two texts: logits of one that reached the other would show in its text."""
    scripts = {">": "hello", "#": "a longer answer"}
    ids = {tokenizer.encode(prompt)[0]: [*tokenizer.encode(text), IM_END] for prompt, text in scripts.items()}
    model = fake_model(tokenizer, lambda seen: ids[seen[0]][len(seen) - 1])
    running = {prompt: model.generate(prompt) for prompt in scripts}
    found = {}
    while running:
        for prompt, events in list(running.items()):
            event = next(events)
            if isinstance(event, qrun.Answer):
                found[prompt] = event.text
                del running[prompt]
    assert found == scripts


def test_an_answer_can_be_cancelled_at_any_event(tokenizer):
    model = saying(tokenizer, "hello")
    params, _ = model.resolve({})
    answering = model.answering(tokenizer.encode(">"), params)
    seen = []
    for event in answering.events():
        seen.append(event)
        if isinstance(event, qrun.Piece) and event.text == "e":
            answering.cancel()
    assert pieces(seen) == ["h", "e"]
    assert (seen[-1].finish_reason, seen[-1].text) == ("cancelled", "he")


def test_a_token_that_was_computed_while_the_answer_was_cancelled_is_not_shown(tokenizer):
    """A Ctrl-C mostly strikes amid a step, and a word after it looks as if it had not been heard."""
    script = tokenizer.encode("hello")

    def rule(seen: list[int]) -> int:
        if len(seen) == len(">hel"):
            answering.cancel()
        return script[len(seen) - 1]

    model = fake_model(tokenizer, rule)
    params, _ = model.resolve({})
    answering = model.answering(tokenizer.encode(">"), params)
    *events, answer = answering.events()
    assert pieces(events) == list("hel")
    assert (answer.finish_reason, answer.text, answer.completion_tokens) == ("cancelled", "hel", 3)


def test_a_cancelled_prompt_is_not_read_to_its_end(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "x"), manifest=fake_manifest(context_length=4096))
    params, _ = model.resolve({})
    answering = model.answering(tokenizer.encode("a" * (3 * PREFILL_CHUNK)), params)
    events = answering.events()
    next(events)
    next(events)
    answering.cancel()
    *_, answer = events
    assert (answer.finish_reason, answer.text, answer.completion_tokens) == ("cancelled", "", 0)
    assert fed_tokens(model) == PREFILL_CHUNK


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("x" * 300, {}, "300 tokens, the model's context is 256"),
        ("x", {"top_p": 1.5}, "top_p must be a number from 0 to 1"),
        ("x", {"max_token": 5}, "did you mean max_tokens"),
    ],
)
def test_a_bad_request_is_refused_at_the_call_and_not_later(tokenizer, prompt, sampling, message):
    with pytest.raises(QrunError, match=message):
        saying(tokenizer, "hello").generate(prompt, **sampling)


def test_a_token_id_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(QrunError, match="token id 5000 is outside the vocabulary of 320"):
        list(saying(tokenizer, "hello").generate([5000]))


def test_sampling_is_resolved_from_request_then_model_then_ours(tokenizer):
    model = fake_model(tokenizer, lambda seen: 0, generation_config={"temperature": 0.7, "do_sample": True})
    params, sources = model.resolve({"top_k": 5})
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 5, 1.0)
    assert [sources[name] for name in ("temperature", "top_k", "top_p", "eos_token_ids")] == [
        "generation_config.json",
        "request",
        "default",
        "qconvert.json",
    ]


def test_the_rates_leave_out_reused_tokens_and_the_first_one():
    answer = qrun.Answer("x", (AB,) * 11, "eos", 100, 50, 11, prefill_seconds=0.5, decode_seconds=2.0)
    assert answer.prefill_tokens_per_second == 100
    assert answer.decode_tokens_per_second == 5


def test_an_exported_folder_opens_with_all_its_parts(tiny_export):
    model = qrun.open(tiny_export, threads=1)
    assert model.device == "CPU, 1 thread"
    assert model.template is not None
    assert model.generation_config["temperature"] == 0.7
    *_, answer = model.generate("hello", max_tokens=5, do_sample=False, ignore_eos=True)
    *_, again = model.generate(
        model.tokenizer.encode("hello"), max_tokens=5, do_sample=False, ignore_eos=True
    )
    assert answer.token_ids == again.token_ids
    assert len(answer.token_ids) == 5
    assert model.tokenizer.decode(answer.token_ids) == answer.text


def test_the_graph_in_the_folder_is_as_good_as_the_folder(tiny_export):
    assert qrun.open(tiny_export / "model.onnx").manifest.folder == tiny_export


def test_a_seed_makes_an_answer_repeatable(tiny_export):
    model = qrun.open(tiny_export)
    answers = {
        seed: [
            list(model.generate("hi", max_tokens=20, temperature=1.0, seed=seed))[-1].token_ids for _ in "12"
        ]
        for seed in (1, 2)
    }
    assert answers[1][0] == answers[1][1]
    assert answers[1] != answers[2]


def test_a_folder_without_a_template_still_continues_text(broken):
    (broken / "tokenizer_config.json").write_text("{}")
    forget_files(broken, "tokenizer_config.json", "chat_template.jinja")
    model = qrun.open(broken)
    assert model.template is None
    assert list(model.generate("hi", max_tokens=1))
    with pytest.raises(QrunError, match="has no chat template"):
        model.chat()


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_generation_config_is_named(broken, content, message):
    (broken / "generation_config.json").write_text(content)
    forget_files(broken, "generation_config.json")
    with pytest.raises(QrunError, match=message):
        qrun.open(broken)


def test_a_folder_without_a_tokenizer_is_refused(broken):
    (broken / "tokenizer.json").unlink()
    forget_files(broken, "tokenizer.json")
    with pytest.raises(QrunError, match=r"no tokenizer\.json"):
        qrun.open(broken)


def forget_files(folder, *names: str) -> None:
    """Take files out of the manifest, so that their change is not seen there."""
    path = folder / "qconvert.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] not in names]
    path.write_text(json.dumps(manifest))
    if "chat_template.jinja" in names:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
