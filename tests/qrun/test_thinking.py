"""If these fail, Qwen3 thinks when it was told not to, or a wish that no template reads is ignored."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from qrun.cli import main as cli
from qrun.errors import QrunError
from qrun.text.chat_template import ChatTemplate
from qrun.text.tokenizer import Tokenizer
from tests.assets import qwen3_tokenizer_folder
from tests.fakes import fake_manifest, fake_model, scripted
from tests.qrun.test_chat_template import WEATHER

USER = {"role": "user", "content": "What is 2 + 2?"}
TURNS = [
    USER,
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
    {"role": "user", "content": "And the weather in Oslo?"},
]
CALLED = [
    *TURNS,
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I ask.",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
        ],
    },
    {"role": "tool", "content": "rain"},
]
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def folder():
    return qwen3_tokenizer_folder()


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def model(folder, tokenizer):
    """Answers with 4, and with an empty thought before it where the prompt has none."""
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    manifest = fake_manifest(context_length=4096)
    rule = scripted(tokenizer, [NO_THOUGHT + "4"] * 5)
    return fake_model(tokenizer, rule, manifest=manifest, template=source)


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", [[USER], TURNS, CALLED], ids=["one", "turns", "called"])
def test_qwen3_s_template_is_rendered_as_transformers_renders_it(folder, theirs, messages, tools, thinking):
    variables = {} if thinking is None else {"enable_thinking": thinking}
    ours = ChatTemplate.from_folder(folder).given(variables).render(messages, tools=tools)
    assert ours == theirs.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **variables
    )
    assert ours.endswith(NO_THOUGHT) is (thinking is False)


def test_tokens_of_qwen3_are_those_of_its_own_tokenizer(folder, theirs):
    tokenizer = Tokenizer.from_folder(folder)
    for text in ("a <think> 你好\n</think>", "<tool_call>\n{}</tool_call>", "I've 12345 😀\r\n\t x"):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]


def test_a_chat_passes_the_wish_on_in_every_turn(model):
    chat = model.chat(variables={"enable_thinking": False})
    for _ in range(2):
        list(chat.send("What is 2 + 2?"))
    prompt = model.chat_prompt([USER], variables={"enable_thinking": False})
    assert model.tokenizer.decode(prompt, skip_special_tokens=False).endswith(NO_THOUGHT)
    assert chat.answers[0].prompt_tokens == len(prompt)
    assert [answer.text for answer in chat.answers] == ["4", "4"]
    assert len(prompt) - len(model.chat_prompt([USER])) == len(model.tokenizer.encode(NO_THOUGHT))


@pytest.mark.parametrize("name", ["thinking_budget", "messages", "tools"])
def test_what_the_template_does_not_read_is_refused_by_name(model, name):
    with pytest.raises(QrunError, match=name):
        model.chat(variables={name: 1})
    with pytest.raises(QrunError, match=name):
        model.chat_prompt([USER], variables={name: 1})


def test_variables_are_json(model):
    with pytest.raises(QrunError, match="JSON values"):
        model.chat(variables={"enable_thinking": object()})


@pytest.fixture
def opened(monkeypatch, model):
    """The command line opens this model, whatever folder is named."""

    def put(found):
        monkeypatch.setattr(cli, "open_model", lambda **_: found)
        return CliRunner()

    return put


def test_the_command_line_says_it(opened, model):
    asked = ["generate", "--engine", "m", "--prompt", "What is 2 + 2?", "--json"]
    tokens = {
        option: json.loads(opened(model).invoke(cli.main, [*asked, *option]).stdout)["prompt_tokens"]
        for option in ((), ("--thinking",), ("--no-thinking",))
    }
    empty = len(model.tokenizer.encode(NO_THOUGHT))
    assert tokens["--no-thinking",] == tokens[()] + empty == tokens["--thinking",] + empty
    done = opened(model).invoke(cli.main, ["chat", "--engine", "m", "--no-thinking"], input="2 + 2?\n")
    assert (done.exit_code, done.stdout.strip()) == (0, "4")


def test_a_template_that_knows_no_thinking_refuses_it(opened, tokenizer):
    plain = fake_model(tokenizer, scripted(tokenizer, ["x"] * 3))
    for command in (["generate", "--prompt", "Hi"], ["chat"]):
        done = opened(plain).invoke(cli.main, [*command, "--engine", "m", "--no-thinking"], input="Hi\n")
        assert done.exit_code == 1
        assert "the model's chat template knows no enable_thinking" in done.stderr
    raw = ["generate", "--engine", "m", "--prompt", "Hi", "--raw", "--thinking"]
    assert opened(plain).invoke(cli.main, raw).exit_code == 2


def test_a_template_of_its_own_for_tools_is_asked_too(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ depth }}"},
    ]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path / "m")
    assert template.given({"depth": 3}).render([USER], tools=[WEATHER]) == "3"
    with pytest.raises(QrunError, match="knows no depth"):
        template.named("default").given({"depth": 3})
