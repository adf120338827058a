"""If these fail, the model reads another prompt than it was trained on, or a template leaves its sandbox."""

from __future__ import annotations

import enum
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qrun.errors import QrunError
from qrun.text.chat_template import ChatTemplate
from tests.assets import qwen_tokenizer_folder
from tests.tiny import write_tiny_tokenizer

USER = {"role": "user", "content": "Hello"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, in °C <b>now</b> & here",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "北京"]}},
        },
    },
}
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "北京", "days": [1, 2.5, None]}},
}
CHATS = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "You are terse."}, USER],
    "empty system": [{"role": "system", "content": ""}, USER],
    "several turns": [
        USER,
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": " Bye \n\n"},
    ],
    "chinese": [
        {"role": "system", "content": "你是一个助手。"},
        {"role": "user", "content": "法国的首都是哪里？"},
    ],
    "emoji": [{"role": "user", "content": "👨‍👩‍👧‍👦 🏳️‍🌈 \u200d"}],
    "markup": [{"role": "user", "content": "<b>&amp;'\"</b> {{ 1 + 1 }} {% if %} <|im_end|>"}],
    "tool call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "name": "get_weather", "content": '{"celsius": 21}'},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "21 °C", "tool_calls": None},
    ],
    "late system": [USER, {"role": "system", "content": "Now in French."}],
}


def reference_text(folder: Path, messages, **options) -> str:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture(scope="module")
def qwen_reference():
    return AutoTokenizer.from_pretrained(qwen_tokenizer_folder())


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("tools", [None, [], [WEATHER, WEATHER]], ids=["no tools", "empty tools", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_qwen_s_own_template_renders_as_in_transformers(
    qwen_reference, messages, tools, add_generation_prompt
):
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    rendered = ChatTemplate.from_folder(qwen_tokenizer_folder()).render(messages, **options)
    assert rendered == qwen_reference.apply_chat_template(messages, tokenize=False, **options)


# Each uses one thing that transformers adds to Jinja, or sets otherwise than Jinja does.
TEMPLATES = {
    "tojson": "{{ messages | tojson }}{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true) }}",
    "tojson with indent": "{{ tools | tojson(indent=2) }}",
    "tojson separators": "{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "blocks": "a\n  {% if true %}\n  b\n  {% endif %}\nc\n  {# note #}\nd\n",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m }}{% endfor %}",
    "generation tag": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ tools }}{% endgeneration %}{{ x }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}",
    "namespace": "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + n.self %}{{ n.a }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 3) }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing is defined }}{{ documents is none }}",
    "null": "{{ messages[1].name is defined }}",
    "reasoning": "{{ messages[1].reasoning_content }}{{ messages[1].thinking }}",
    "extra": "{{ enable_thinking }}{{ numbers | join('-') }}{{ pair is sequence }}",
    "strftime": "{{ strftime_now('%Y') }}",
    "filters": "{{ messages[0].content | upper | trim }}{{ messages | map(attribute='role') | list }}",
}


def folder_with(folder: Path, template: object) -> Path:
    write_tiny_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_everything_that_transformers_gives_to_a_template(tmp_path, template):
    messages = [USER, {"role": "assistant", "content": "4", "reasoning": "2 + 2", "name": None}]
    options = {"tools": [WEATHER], "enable_thinking": False, "numbers": [1, 2], "pair": (1, 2)}
    folder = folder_with(tmp_path, template)
    rendered = ChatTemplate.from_folder(folder).render(messages, **options)
    assert rendered == reference_text(folder, messages, add_generation_prompt=True, **options)
    assert rendered


def test_the_file_of_its_own_comes_before_the_configuration(tmp_path):
    folder = folder_with(tmp_path, "from the configuration")
    (folder / "chat_template.jinja").write_bytes("from the file: é\r\n{{ messages[0].role }}".encode())
    assert ChatTemplate.from_folder(folder).render([USER]) == reference_text(folder, [USER])
    assert ChatTemplate.from_folder(folder).render([USER]).startswith("from the file")


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = folder_with(tmp_path, named)
    template = ChatTemplate.from_folder(folder)
    for tools, expected in ((None, "plain"), ([WEATHER], "with tools"), ([], "with tools")):
        assert template.render([USER], tools=tools) == reference_text(folder, [USER], tools=tools) == expected


def test_named_templates_without_a_default(tmp_path):
    template = ChatTemplate.from_folder(folder_with(tmp_path, [{"name": "rag", "template": "x"}]))
    with pytest.raises(QrunError, match=r"'default', only 'rag'"):
        template.render([USER])


@pytest.mark.parametrize("broken", [7, [], ["x"], [{"name": "default"}], [{"name": "a", "template": 3}]])
def test_a_misshapen_chat_template_key(tmp_path, broken):
    with pytest.raises(QrunError, match="chat_template must be") as caught:
        ChatTemplate.from_folder(folder_with(tmp_path, broken))
    assert str(caught.value.where).endswith("tokenizer_config.json")


def test_no_template_says_what_to_do(tmp_path):
    with pytest.raises(QrunError, match="no chat template") as caught:
        ChatTemplate.from_folder(folder_with(tmp_path, None))
    assert "plain prompt" in str(caught.value.hint)


def test_a_syntax_error_names_the_line(tmp_path):
    with pytest.raises(QrunError, match="syntax is wrong in line 2"):
        ChatTemplate.from_folder(folder_with(tmp_path, "fine\n{% for %}"))


def test_a_template_file_that_is_not_text(tmp_path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(QrunError, match="not UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_the_template_s_own_refusal_is_passed_on():
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    with pytest.raises(QrunError, match="roles must alternate"):
        template.render([USER])


@pytest.mark.parametrize(
    "source", ["{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages[0] + [] }}"]
)
def test_a_template_that_fails_is_one_clear_error(source):
    with pytest.raises(QrunError, match="chat template"):
        ChatTemplate({"default": source}, {}).render([USER])


class Shout(str, enum.Enum):
    HEY = "hey"


class Spy:
    role = "user"

    def write(self) -> str:
        raise AssertionError("a template called a method of a caller's object")


@pytest.mark.parametrize(
    "messages",
    [[], "Hello", USER, None, 3, ["Hello"], [{"content": "x"}], [{"role": None}], [{"role": 1}], [[USER]]],
    ids=repr,
)
def test_misshapen_messages(messages):
    with pytest.raises(QrunError, match="messages"):
        ChatTemplate({"default": "x"}, {}).render(messages)


@pytest.mark.parametrize(
    "tools", ["get_weather", WEATHER, [print], ["x"]], ids=["text", "object", "function", "list"]
)
def test_misshapen_tools(tools):
    with pytest.raises(QrunError, match="JSON schemas"):
        ChatTemplate({"default": "x"}, {}).render([USER], tools=tools)


def test_the_template_s_own_variables_cannot_be_replaced():
    with pytest.raises(QrunError, match="'documents'"):
        ChatTemplate({"default": "x"}, {}).render([USER], documents=[])


MALICIOUS = {
    "class of a string": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format by another name": "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "init of a global": "{{ namespace.__init__.__globals__ }}",
    "dict's class": "{{ dict.__class__.__mro__ }}",
    "private name in a namespace": "{% set n = namespace(__class__=1) %}",
    "private name set later": "{% set n = namespace() %}{% set n.__init__ = 1 %}",
    "append": "{{ messages.append(1) }}",
    "clear": "{{ messages.clear() }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "pop of a tool": "{{ tools.pop() }}",
    "huge range": "{% for i in range(10000000000) %}x{% endfor %}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("source", MALICIOUS.values(), ids=MALICIOUS)
def test_the_sandbox_holds(source):
    messages, tools = [dict(USER)], [dict(WEATHER)]
    try:
        rendered = ChatTemplate({"default": source}, {}).render(messages, tools=tools)
    except QrunError:
        rendered = ""
    assert rendered == "", "Jinja raises, or prints a forbidden attribute as nothing; this printed something"
    assert (messages, tools) == ([USER], [WEATHER])


def test_a_template_sees_plain_values_only():
    template = ChatTemplate(
        {"default": "{{ messages[0].content }}{{ messages[0].content.name is defined }}"}, {}
    )
    assert template.render([{"role": "user", "content": Shout.HEY}]) == "heyFalse"
    with pytest.raises(QrunError, match="JSON values, not a Spy"):
        template.render([{"role": "user", "content": Spy()}])
    with pytest.raises(QrunError, match="JSON values, not a Spy"):
        template.render([USER], spy=Spy())
