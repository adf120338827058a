"""If these fail, a conversation is computed again at each turn, or is not the one that was spoken."""

from __future__ import annotations

import pytest

import qrun
from qrun.errors import QrunError
from tests.fakes import (
    AB,
    IM_END,
    Rule,
    fake_manifest,
    fake_model,
    fed_tokens,
    repeating,
    scripted,
)
from tests.tiny import CHAT_TEMPLATE

# Around a user's message: <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n
USER_OVERHEAD = len("1user\n") + len("1\n") + len("1assistant\n")
# Between an answer and the next message: <|im_end|>\n
END_OF_ANSWER = len("1\n")


def chat_of(tokenizer, answers, **options):
    system = options.pop("system", None)
    model = fake_model(tokenizer, scripted(tokenizer, answers), **options)
    return model, model.chat(system)


def say(chat, text: str, **overrides) -> qrun.Answer:
    *_, answer = chat.send(text, **overrides)
    assert isinstance(answer, qrun.Answer)
    return answer


def test_turns_are_kept_as_messages(tokenizer):
    _, chat = chat_of(tokenizer, ["Paris.", "Rome."])
    assert say(chat, "France?").text == "Paris."
    assert say(chat, "Italy?").text == "Rome."
    assert chat.messages == [
        {"role": "user", "content": "France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Italy?"},
        {"role": "assistant", "content": "Rome."},
    ]


def test_from_the_second_turn_on_only_new_tokens_are_computed(tokenizer):
    model, chat = chat_of(tokenizer, ["Paris.", "Rome.", "Bern."])
    first = say(chat, "France?")
    assert first.reused_tokens == 0
    for question in ("Italy?", "Switzerland?"):
        before = chat.context.cache.length
        fed_tokens(model)
        answer = say(chat, question)
        assert answer.reused_tokens == before
        new = END_OF_ANSWER + USER_OVERHEAD + len(question)
        assert answer.prompt_tokens - answer.reused_tokens == new
        assert fed_tokens(model) == new + answer.completion_tokens


def test_an_answer_keeps_its_own_tokens_where_its_text_would_be_encoded_otherwise(merging_tokenizer):
    """ "a" and "b" were generated as two tokens; the text "ab" is encoded as one."""
    a, b = (merging_tokenizer.token_id(letter) for letter in "ab")
    assert merging_tokenizer.encode("ab") == [AB]
    _, chat = chat_of(merging_tokenizer, [[a, b, a, b], "ok"])
    assert say(chat, "one").token_ids == (a, b, a, b)
    before = chat.context.cache.length
    assert say(chat, "two").reused_tokens == before


def test_an_answer_that_a_stop_string_cut_is_continued_from_its_shown_text(tokenizer):
    model, chat = chat_of(tokenizer, ["yes STOP no", "fine"])
    answer = say(chat, "one", stop="STOP")
    assert (answer.text, answer.finish_reason) == ("yes ", "stop")
    model.session.rule = scripted(tokenizer, ["yes ", "fine"])  # it checks what the cache holds
    prompt = answer.prompt_tokens
    assert say(chat, "two").text == "fine"
    assert chat.answers[-1].reused_tokens == prompt + len("yes ")


def test_an_answer_cut_by_max_tokens_stays_as_far_as_it_went(tokenizer):
    model, chat = chat_of(tokenizer, ["a long answer", "ok"])
    assert say(chat, "one", max_tokens=6).text == "a long"
    model.session.rule = scripted(tokenizer, ["a long", "ok"])
    before = chat.context.cache.length
    assert say(chat, "two").reused_tokens == before


def test_a_loop_that_is_left_keeps_the_answer_as_far_as_it_went(tokenizer):
    model, chat = chat_of(tokenizer, ["hello there", "ok"])
    left = chat.send("hi")
    for event in left:
        if isinstance(event, qrun.Piece) and event.text == "o":
            break
    chat.send("unused").close()  # a new turn ends the one that was left, although ``left`` still holds it
    assert list(left) == []
    assert chat.messages[-1] == {"role": "assistant", "content": "hello"}
    model.session.rule = scripted(tokenizer, ["hello", "ok"])
    fed_tokens(model)
    assert say(chat, "two").text == "ok"
    # The "o" was sampled and not yet fed when the loop was left.
    assert fed_tokens(model) == 1 + END_OF_ANSWER + USER_OVERHEAD + len("two") + len("ok")


def test_a_cancelled_answer_stays_as_far_as_it_went(tokenizer):
    _, chat = chat_of(tokenizer, ["hello there"])
    events = []
    for event in chat.send("hi"):
        events.append(event)
        if isinstance(event, qrun.Piece) and event.text == "o":
            chat.cancel()
    assert (events[-1].finish_reason, events[-1].text) == ("cancelled", "hello")
    assert chat.messages[-1] == {"role": "assistant", "content": "hello"}
    assert chat.answers == [events[-1]]


def test_an_answer_that_was_stopped_amid_a_character_keeps_whole_characters(tokenizer):
    model, chat = chat_of(tokenizer, ["é🙂", "ok"])
    for event in chat.send("hi", max_tokens=4):
        if isinstance(event, qrun.Piece):
            assert event.text == "é"
            chat.cancel()
    assert chat.messages[-1]["content"] == "é"
    model.session.rule = scripted(tokenizer, ["é", "ok"])
    assert say(chat, "two").text == "ok"


def test_a_turn_that_is_cancelled_before_its_first_word_is_forgotten(tokenizer):
    _, chat = chat_of(tokenizer, ["hello"])
    for event in chat.send("hi"):
        if isinstance(event, qrun.Prefilled):
            chat.cancel()
    assert event.finish_reason == "cancelled"
    assert (chat.messages, chat.answers) == ([], [])
    assert say(chat, "hi").text == "hello"


def test_cancelling_between_turns_does_nothing(tokenizer):
    _, chat = chat_of(tokenizer, ["hello"])
    chat.cancel()
    assert say(chat, "hi").text == "hello"


def test_an_answer_that_ends_at_once_is_an_answer(tokenizer):
    _, chat = chat_of(tokenizer, ["", "ok"])
    assert say(chat, "one").text == ""
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert say(chat, "two").text == "ok"


def test_reset_forgets_the_turns_and_keeps_the_system_message(tokenizer):
    _, chat = chat_of(tokenizer, ["hello", "again"], system="Be brief.")
    say(chat, "one")
    chat.reset()
    assert (chat.messages, chat.answers, chat.context.cache.length) == ([], [], 0)
    assert chat.system_message == "Be brief."
    answer = say(chat, "one")
    assert (answer.text, answer.reused_tokens) == ("hello", 0)


def test_reset_amid_an_answer_forgets_it_too(tokenizer):
    _, chat = chat_of(tokenizer, ["hello"])
    left = chat.send("one")
    while not isinstance(next(left), qrun.Piece):
        pass
    chat.reset()
    left.close()
    assert chat.messages == []
    assert say(chat, "one").text == "hello"


def test_a_new_system_message_is_seen_at_the_next_turn_and_all_is_computed_again(tokenizer):
    seen: list[str] = []
    rule = scripted(tokenizer, ["one", "two"])

    def watching(ids: list[int]) -> int:
        seen.append(tokenizer.decode(ids, skip_special_tokens=False))
        return rule(ids)

    chat = fake_model(tokenizer, watching).chat("Be brief.")
    say(chat, "hi")
    chat.system("Be long.")
    answer = say(chat, "hi")
    assert answer.text == "two"
    assert seen[-1].startswith("<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    assert "Be brief" not in seen[-1]
    assert answer.reused_tokens == len("1system\nBe ")


def test_a_template_that_rewrites_earlier_answers_is_followed(tokenizer):
    """As those of reasoning models do, which drop what was thought in earlier turns."""
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    rule_of_first: Rule = scripted(tokenizer, ["hm</think>yes", "ok"])
    model = fake_model(tokenizer, rule_of_first, template=template)
    chat = model.chat()
    first = say(chat, "one")
    model.session.rule = scripted(tokenizer, ["yes", "ok"])  # what the cache must hold from now on
    answer = say(chat, "two")
    assert answer.text == "ok"
    assert answer.reused_tokens == first.prompt_tokens


def test_a_full_context_ends_the_answer_and_the_next_turn_proposes_reset(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "x"), manifest=fake_manifest(context_length=64))
    chat = model.chat()
    assert say(chat, "hi").finish_reason == "context"
    messages = list(chat.messages)
    with pytest.raises(QrunError, match=r"context of fake ends at 64(.|\n)*/reset"):
        list(chat.send("more"))
    assert chat.messages == messages, "a message that was refused is in the conversation"
    chat.reset()
    assert say(chat, "hi").finish_reason == "context"


def test_a_first_message_beyond_the_context_is_to_be_shortened(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "x"), manifest=fake_manifest(context_length=64))
    with pytest.raises(QrunError, match="shorten the message"):
        list(model.chat().send("x" * 100))


def test_an_error_amid_an_answer_keeps_what_was_said(tokenizer):
    rule = scripted(tokenizer, ["hello there", "ok"])

    def failing(seen: list[int]) -> int:
        if tokenizer.decode(seen).endswith("assistant\nhello"):
            raise QrunError("out of memory")
        return rule(seen)

    chat = fake_model(tokenizer, failing).chat()
    with pytest.raises(QrunError, match="out of memory"):
        say(chat, "hi")
    assert chat.messages[-1] == {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_refused_and_forgotten(tokenizer, text):
    _, chat = chat_of(tokenizer, ["hello"])
    with pytest.raises(QrunError, match="the message is empty"):
        list(chat.send(text))
    assert chat.messages == []


def test_bad_parameters_are_refused_when_the_chat_begins_and_at_a_turn(tokenizer):
    model, chat = chat_of(tokenizer, ["hello"])
    with pytest.raises(QrunError, match="temperature"):
        model.chat(temperature=-1)
    with pytest.raises(QrunError, match="top_q"):
        list(chat.send("hi", top_q=1))
    assert say(chat, "hi").text == "hello"


def test_parameters_of_the_chat_hold_for_every_turn_and_those_of_a_turn_for_one(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "x"))
    chat = model.chat(max_tokens=3)
    assert [say(chat, "a").text, say(chat, "a", max_tokens=1).text, say(chat, "a").text] == [
        "xxx",
        "x",
        "xxx",
    ]


def test_a_model_without_a_template_cannot_chat(tokenizer):
    model = fake_model(tokenizer, lambda seen: IM_END, template=None)
    with pytest.raises(QrunError, match=r"fake has no chat template(.|\n)*--raw"):
        model.chat()


def test_two_chats_with_one_model_do_not_disturb_each_other(tokenizer):
    """Each has questions and answers of its own: a token, logit or buffer that crossed over would show."""
    left_script = scripted(tokenizer, ["first answer", "a second one"])
    right_script = scripted(tokenizer, ["eins", "und zwei, etwas laenger"])
    mark = tokenizer.encode("R")[0]
    model = fake_model(tokenizer, lambda seen: (right_script if mark in seen else left_script)(seen))
    left, right = model.chat(), model.chat()
    found = []
    for questions in (("a", "R1"), ("and b?", "R2, and more")):
        running = [left.send(questions[0]), right.send(questions[1])]
        answers = [None, None]
        while None in answers:
            for index, events in enumerate(running):
                if answers[index] is None:
                    event = next(events)
                    if isinstance(event, qrun.Answer):
                        answers[index] = event.text
                        assert list(events) == []
        found.append(answers)
    assert found == [["first answer", "eins"], ["a second one", "und zwei, etwas laenger"]]
    assert [message["content"] for message in left.messages[::2]] == ["a", "and b?"]
    assert [message["content"] for message in left.messages[1::2]] == ["first answer", "a second one"]


def test_kept_turns_give_the_same_answer_as_a_fresh_computation(tiny_export):
    """With a real graph: what the cache kept is what the whole conversation gives, computed anew."""
    model = qrun.open(tiny_export, threads=1)
    greedy = {"do_sample": False, "max_tokens": 12, "ignore_eos": True, "repetition_penalty": 1.0}
    chat = model.chat(**greedy)
    turns = [say(chat, text) for text in ("hello", "and now?", "go on")]
    assert all(turn.reused_tokens > 0 for turn in turns[1:])
    prompt = chat.context.token_ids[: turns[-1].prompt_tokens]
    *_, fresh = model.generate(
        prompt, do_sample=False, max_tokens=12, ignore_eos=True, repetition_penalty=1.0
    )
    assert fresh.reused_tokens == 0
    assert fresh.token_ids == turns[-1].token_ids
