"""If these fail, a user of ``qrun`` sees a traceback, a wrong exit code, or output that none can read."""

from __future__ import annotations

import json

import pytest

from qrun.cli import main as cli
from qrun.cli import options
from tests.commands import qrun, refused
from tests.fakes import fake_manifest, fake_model, repeating, scripted


@pytest.fixture
def answering(tokenizer, monkeypatch):
    """Puts a model that gives these answers in the place of --engine."""

    def use(*answers: str, **settings):
        model = fake_model(tokenizer, scripted(tokenizer, answers), **settings)
        monkeypatch.setattr(options.Model, "open", lambda *_, **__: model)
        return model

    return use


# generate


def test_the_answer_alone_is_on_stdout(answering):
    answering("Paris.")
    result = qrun("generate", "--engine", "x", "--prompt", "The capital of France?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris.\n", "")


def test_an_answer_that_ends_its_line_gets_no_second_end(answering):
    answering("Paris.\n")
    assert qrun("generate", "--engine", "x", "--prompt", "?").stdout == "Paris.\n"


def test_json_is_one_object_with_everything(answering):
    answering("Par🙂s")
    result = qrun("generate", "--engine", "x", "--prompt", "?", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "Par🙂s"
    assert len(answer["token_ids"]) == answer["completion_tokens"] == 8
    assert answer["finish_reason"] == "eos"
    assert answer["prompt_tokens"] == len("1user\n?1\n1assistant\n")
    assert answer["prefill_seconds"] > 0
    assert answer["decode_seconds"] > 0
    assert set(answer) == {
        "text",
        "token_ids",
        "finish_reason",
        "stop",
        "prompt_tokens",
        "reused_tokens",
        "completion_tokens",
        "prefill_seconds",
        "decode_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "guessed_tokens",
        "accepted_tokens",
    }


def test_a_prompt_is_one_turn_of_a_chat_where_the_model_has_a_template(answering, tokenizer):
    model = answering("ok")
    qrun("generate", "--engine", "x", "--prompt", "hi", "--system", "Be brief.")
    prompt = tokenizer.decode(model.session.fed[0], skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_raw_prompt_is_continued_as_it_is(tokenizer, monkeypatch):
    model = fake_model(tokenizer, repeating(tokenizer, "x"))
    monkeypatch.setattr(options.Model, "open", lambda *_, **__: model)
    result = qrun("generate", "--engine", "x", "--prompt", "hi", "--raw", "--max-tokens", 3)
    assert (result.stdout, model.session.fed[0]) == ("xxx\n", tokenizer.encode("hi"))


def test_a_model_without_a_template_continues_the_prompt(tokenizer, monkeypatch):
    model = fake_model(tokenizer, repeating(tokenizer, "x"), template=None)
    monkeypatch.setattr(options.Model, "open", lambda *_, **__: model)
    assert qrun("generate", "--engine", "x", "--prompt", "hi", "--max-tokens", 3).stdout == "xxx\n"
    assert "no chat template" in refused(qrun("generate", "--engine", "x", "--prompt", "hi", "--chat"))


def test_without_max_tokens_an_answer_ends_somewhere(tokenizer, monkeypatch):
    manifest = fake_manifest(context_length=4096)
    for config, expected in (({}, cli.DEFAULT_MAX_TOKENS), ({"max_new_tokens": 7}, 7)):
        model = fake_model(tokenizer, repeating(tokenizer, "x"), manifest=manifest, generation_config=config)
        monkeypatch.setattr(options.Model, "open", lambda *_, model=model, **__: model)
        answer = json.loads(qrun("generate", "--engine", "x", "--prompt", "hi", "--json").stdout)
        assert (answer["completion_tokens"], answer["finish_reason"]) == (expected, "length")


@pytest.mark.parametrize("source", ["stdin", "file"])
def test_a_prompt_comes_from_stdin_or_a_file_too(answering, tokenizer, tmp_path, source):
    model = answering("ok")
    text = "Zwei Zeilen,\n你好"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    given = ("--prompt", "-") if source == "stdin" else ("--prompt-file", tmp_path / "prompt.txt")
    assert qrun("generate", "--engine", "x", *given, stdin=text).stdout == "ok\n"
    assert text in tokenizer.decode(model.session.fed[0])


@pytest.mark.parametrize("arguments", [(), ("--prompt", "a", "--prompt-file", "b")])
def test_exactly_one_prompt_is_wanted(answering, arguments):
    answering("ok")
    assert "either --prompt or --prompt-file" in refused(qrun("generate", "--engine", "x", *arguments), 2)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(answering, prompt):
    answering("ok")
    assert "the prompt is empty" in refused(qrun("generate", "--engine", "x", "--prompt", prompt))
    assert "the prompt is empty" in refused(qrun("generate", "--engine", "x", "--prompt", "-", stdin=prompt))


def test_a_prompt_that_is_not_utf8_or_not_there_is_refused(answering, tmp_path):
    answering("ok")
    (tmp_path / "latin1").write_bytes("é".encode("latin-1"))
    message = refused(qrun("generate", "--engine", "x", "--prompt-file", tmp_path / "latin1"))
    assert "not UTF-8" in message
    message = refused(qrun("generate", "--engine", "x", "--prompt-file", tmp_path / "none"))
    assert "the prompt file cannot be read: No such file" in message
    assert "not UTF-8" in refused(qrun("generate", "--engine", "x", "--prompt", "-", stdin=b"\xe9"))


@pytest.mark.parametrize("mode", ["--raw", "--chat"])
def test_a_prompt_longer_than_the_context_is_refused(answering, mode):
    answering("ok")
    message = refused(qrun("generate", "--engine", "x", "--prompt", "x" * 300, mode))
    assert "256" in message
    assert "shorten" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--temperature", -1), "--temperature must be 0 (greedy) or a number"),
        (("--top-p", 1.5), "--top-p must be a number from 0 to 1 (off), not 1.5"),
        (("--top-k", -3), "--top-k must be a whole number from 0 (off) up, not -3"),
        (("--max-tokens", 0), "--max-tokens must be a whole number from 1 up, not 0"),
        (("--presence-penalty", 3), "--presence-penalty must be a number from -2 to 2"),
        (("--greedy", "--temperature", 0.7), "--greedy and --temperature=0.7 contradict each other"),
        (("--threads", 0), "--threads"),
        (("--device", "tpu"), "--device"),
        (("--seed", "x"), "--seed"),
        (("--raw", "--system", "x"), "--system has no place in a --raw prompt"),
    ],
    ids=str,
)
def test_bad_options_are_wrong_usage_and_named(answering, given, message):
    answering("ok")
    assert message in refused(qrun("generate", "--engine", "x", "--prompt", "hi", *given), 2)


def test_sampling_options_reach_the_sampler_zero_included(answering):
    answering("ok")
    given = ("--temperature", 0, "--seed", 0, "--stop", "a", "--stop", "b", "--min-p", 0.1)
    result = qrun("generate", "--engine", "x", "--prompt", "hi", "-v", *given)
    shown = {
        name: rest.split()[-1]
        for name, rest in (line.split(maxsplit=1) for line in result.stderr.splitlines() if " " in line)
    }
    assert shown["temperature"] == shown["seed"] == shown["stop"] == shown["min_p"] == "request"
    assert shown["top_k"] == shown["max_tokens"] == "default"
    assert "('a', 'b')" in result.stderr


def test_verbose_tells_the_device_and_the_memory_on_stderr_alone(answering):
    answering("ok")
    result = qrun("generate", "--engine", "x", "--prompt", "hi", "-v")
    assert result.stdout == "ok\n"
    assert "device: fake device" in result.stderr
    assert "512 B per token, 131 kB at full context (256 tokens)" in result.stderr


def test_settings_that_are_not_done_are_warned_of(answering):
    answering("ok", generation_config={"num_beams": 4})
    result = qrun("generate", "--engine", "x", "--prompt", "hi")
    assert "asks for num_beams=4, which qrun does not do" in result.stderr
    assert result.stdout == "ok\n"


# chat through a pipe


def test_lines_of_a_pipe_are_turns_and_commands(answering):
    answering("Paris.", "Rome.")
    result = qrun("chat", "--engine", "x", stdin="France?\n\n/stats\nItaly?\n/exit\nnever read\n")
    assert (result.exit_code, result.stdout) == (0, "Paris.\nRome.\n")
    assert "fake: fp32, fake device, context of 256 tokens" in result.stderr
    assert "6 tokens in" in result.stderr


def test_the_end_of_the_pipe_ends_the_chat(answering):
    answering("Paris.")
    result = qrun("chat", "--engine", "x", stdin="France?")
    assert (result.exit_code, result.stdout) == (0, "Paris.\n")


def test_reset_starts_over(answering):
    model = answering("one", "two")
    result = qrun("chat", "--engine", "x", stdin="a\n/reset\nb\n")
    assert result.stdout == "one\none\n"
    assert "forgotten" in result.stderr
    assert len(model.session.fed[-3]) == 1  # "one" again, token by token


def test_system_shows_and_changes_the_system_message(answering, tokenizer):
    model = answering("one")
    result = qrun("chat", "--engine", "x", "--system", "Be brief.", stdin="/system\n/system Be long.\na\n")
    assert "The system message is: Be brief." in result.stderr
    prompt = tokenizer.decode(model.session.fed[0])
    assert "Be long." in prompt
    assert "Be brief." not in prompt


def test_help_lists_every_command(answering):
    answering()
    stderr = qrun("chat", "--engine", "x", stdin="/help\n").stderr
    assert all(command in stderr for command in ("/reset", "/system", "/stats", "/help", "/exit", "Ctrl-C"))


def test_an_unknown_command_and_a_full_context_leave_the_chat_running(answering, tokenizer):
    answering("ok")
    result = qrun("chat", "--engine", "x", stdin="/resett\n" + "x" * 300 + "\nhi\n")
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    assert "there is no command /resett" in result.stderr
    assert "the conversation would have" in result.stderr


def test_a_path_is_a_message_and_not_a_command(answering):
    answering("ok")
    assert qrun("chat", "--engine", "x", stdin="/usr/bin is what?\n").stdout == "ok\n"


@pytest.mark.parametrize(("status", "said"), [("passed", False), ("not verified", True), ("failed", True)])
def test_a_model_that_is_not_verified_says_so(answering, status, said):
    answering(manifest=fake_manifest(verification=status))
    assert ("not verified" in qrun("chat", "--engine", "x", stdin="").stderr) == said


# forms


def test_an_answer_fits_a_schema_or_an_expression(tokenizer, monkeypatch, tmp_path):
    model = fake_model(tokenizer, repeating(tokenizer, "x"))
    monkeypatch.setattr(options.Model, "open", lambda *_, **__: model)
    (tmp_path / "schema.json").write_text('{"enum": ["xx", 5]}')
    for more in ((), ("--raw",)):
        asked = ("generate", "--engine", "x", "--prompt", "?", *more)
        assert json.loads(qrun(*asked, "--schema", str(tmp_path / "schema.json")).stdout) in ("xx", 5)
        assert qrun(*asked, "--regex", "x{3}").stdout == "xxx\n"
        assert "Give either --schema or --regex" in qrun(*asked, "--regex", "x", "--schema", "y").stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "the schema is not JSON"),
        ('{"not": {}}', 'schema cannot be enforced: "not"'),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(answering, tmp_path, content, said):
    answering("x")
    (tmp_path / "schema.json").write_text(content)
    asked = ("generate", "--engine", "x", "--prompt", "?", "--schema")
    assert said in refused(qrun(*asked, str(tmp_path / "schema.json")))
    assert "the schema cannot be read" in refused(qrun(*asked, "none.json"))
