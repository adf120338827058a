"""If one of these fails, a file that qrun cannot use is copied into an export, after minutes of work."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import qrun
from qconvert.checkpoint.load import open_checkpoint
from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.inspection.inspection import describe
from qrun.cli.main import main as qrun_main
from tests.qconvert.breaking import POINTER, edit_json, refusal
from tests.qconvert.building import refused, run
from tests.tiny import CHAT_TEMPLATE, make_tiny_checkpoint

SYNTAX = "{% for message in %}"


def told_before_the_work(checkpoint: Path, file: str, message: str) -> None:
    """By export and by inspect alike, with the file's name, and nothing is written."""
    output = checkpoint.parent / "model"
    refused(run("export", checkpoint, "--output", output), message, file)
    assert not output.exists()
    inspected = run("inspect", checkpoint, "--json")
    assert inspected.exit_code == 1, inspected.output
    problems = json.loads(inspected.output)["problems"]
    assert any(problem.startswith(file) and message in problem for problem in problems), problems


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"model": 7}',
        '{"version": "1.0", "model": {"type": "BPE"}}',
        '{"version": "1.0", "added_tokens": null, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"version": "9.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    ],
)
def test_json_that_is_no_tokenizer(tied: Path, content: str) -> None:
    # Tracebacks in export and inspect.
    (tied / "tokenizer.json").write_text(content)
    told_before_the_work(tied, "tokenizer.json", "no tokenizer can be made of tokenizer.json")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_with_a_syntax_error(tied: Path, place: str) -> None:
    # It was exported and PASSED, and then no qrun command opened the folder.
    if place == "chat_template.jinja":
        (tied / place).write_text(SYNTAX)
    else:
        edit_json(tied / place, lambda settings: settings.update(chat_template=SYNTAX))
    told_before_the_work(tied, place, "the chat template's syntax is wrong in line 1")


def test_a_chat_template_that_cannot_be_rendered(tied: Path) -> None:
    (tied / "chat_template.jinja").write_text("{{ messages[5].content.nothing() }}")
    told_before_the_work(tied, "chat_template.jinja", "the chat template")


@pytest.mark.parametrize("value", [7, [], [{"name": "default"}], {"template": "x"}])
def test_a_chat_template_of_another_type(tied: Path, value: object) -> None:
    edit_json(tied / "tokenizer_config.json", lambda settings: settings.update(chat_template=value))
    told_before_the_work(tied, "tokenizer_config.json", "chat_template must be a template, or a list")


def test_a_further_template_with_a_syntax_error(tied: Path) -> None:
    (tied / "additional_chat_templates").mkdir()
    (tied / "additional_chat_templates" / "rag.jinja").write_text(SYNTAX)
    told_before_the_work(tied, "additional_chat_templates/rag.jinja", "syntax is wrong in line 1")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{not JSON", "[]", POINTER, ""])
def test_a_broken_file_beside_the_tokenizer(tied: Path, name: str, content: str) -> None:
    (tied / name).write_text(content)
    told_before_the_work(tied, name, f"{name} is ")


@pytest.mark.parametrize(("key", "value"), [("top_p", 1.5), ("temperature", -1), ("top_k", "many")])
def test_inspect_tells_a_default_that_qrun_would_refuse(tied: Path, key: str, value: object) -> None:
    edit_json(tied / "generation_config.json", lambda config: config.update({key: value}))
    told_before_the_work(tied, "generation_config.json", f"{key} must be")


def test_byte_order_marks_are_no_matter(tied: Path, tmp_path: Path) -> None:
    # Windows editors write them: the export PASSED, and no qrun command opened it.
    (tied / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for path in (*tied.glob("*.json"), *tied.glob("*.jinja")):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert describe(tied).whole
    result = run("export", tied, "--output", tmp_path / "m", "--no-verify")
    assert result.exit_code == 0, result.output
    assert not [path for path in (tmp_path / "m").iterdir() if path.read_bytes()[:3] == codecs.BOM_UTF8]
    model = qrun.open(tmp_path / "m")
    assert model.template is not None
    rendered = model.template.render([{"role": "user", "content": "x"}], add_generation_prompt=False)
    assert rendered == "<|im_start|>user\nx<|im_end|>\n"


def test_qrun_reads_past_a_byte_order_mark_that_an_editor_has_put_into_a_folder(
    tied: Path, tmp_path: Path
) -> None:
    assert run("export", tied, "--output", tmp_path / "m", "--no-verify").exit_code == 0
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json", "qconvert.json"):
        path = tmp_path / "m" / name
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    from qrun.folder.manifest import read_manifest
    from qrun.text.chat_template import ChatTemplate
    from qrun.text.tokenizer import Tokenizer

    assert read_manifest(tmp_path / "m").precision == "int8"
    assert Tokenizer.from_folder(tmp_path / "m").special_id("eos_token") == 258
    assert ChatTemplate.from_folder(tmp_path / "m").names == ("default",)


def test_json_in_another_encoding_is_refused(tied: Path) -> None:
    # json reads UTF-16 by itself, and qrun does not.
    path = tied / "generation_config.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    assert "generation_config.json is unusable: not UTF-8 text" in str(refusal(tied))


def older_files(folder: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, as checkpoints had them."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    edit_json(
        folder / "tokenizer_config.json",
        lambda settings: settings.update(tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added),
    )
    (folder / "tokenizer.json").unlink()


def test_a_tokenizer_is_made_of_the_older_files(tied: Path, tmp_path: Path) -> None:
    # The export was verified on random tokens, and qrun asked to copy a file that does not exist.
    text = "Grüße, <|im_start|>user\n你好 123"
    before = read_tokenizer(tied)
    older_files(tied)
    after = read_tokenizer(tied)
    assert before is not None
    assert after is not None
    assert after.encode(text).ids == before.encode(text).ids
    assert describe(tied).whole
    result = run("export", tied, "--precision", "fp32", "--output", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "random tokens" not in (tmp_path / "m" / "verification.json").read_text()
    model = qrun.open(tmp_path / "m")
    assert list(model.tokenizer.encode(text)) == before.encode(text).ids
    assert set(model.manifest.eos_token_ids) == {256, 258}
    assert not (tied / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "a\0")]
)
def test_older_files_of_which_no_tokenizer_can_be_made(tied: Path, name: str, content: str) -> None:
    older_files(tied)
    (tied / name).write_text(content)
    told_before_the_work(tied, "tokenizer.json", "no tokenizer.json can be made of vocab.json and merges.txt")


def test_added_tokens_whose_ids_a_conversion_would_change(tied: Path) -> None:
    # It numbers them on, whatever added_tokens_decoder says: control tokens would become others.
    older_files(tied)
    edit_json(
        tied / "tokenizer_config.json",
        lambda settings: settings["added_tokens_decoder"].update(
            {"300": settings["added_tokens_decoder"].pop("257")}
        ),
    )
    told_before_the_work(tied, "tokenizer.json", "the id of '<|im_end|>' becomes 257 where 258 is stated")


def test_a_tokenizer_of_another_model_is_told(tied: Path) -> None:
    content = json.loads((tied / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"token {number}": number for number in range(259, 331)}
    (tied / "tokenizer.json").write_text(json.dumps(content))
    notes = open_checkpoint(tied).notes
    assert any(note.startswith("the tokenizer has token ids up to 33") for note in notes), notes
    assert "the model only 320 tokens: it may be another model's" in notes[-1]


def test_a_special_token_that_is_no_text(tied: Path, tmp_path: Path) -> None:
    # Half of a surrogate pair, which JSON can write: found by a mutated checkpoint.
    edit_json(tied / "tokenizer_config.json", lambda settings: settings.update(eos_token="\ud800"))
    (tied / "added_tokens.json").write_text('{"\\ud800": 300}')
    assert open_checkpoint(tied).ends.ids == [258, 256]
    assert run("inspect", tied).exit_code == 0


def test_an_end_token_that_stands_beside_the_tokenizer_alone(tied: Path) -> None:
    # transformers gives it the next free id, and so do qrun, the proof and the calibration.
    token = {"content": "<|done|>", "special": True}
    edit_json(
        tied / "tokenizer_config.json",
        lambda settings: settings.update(eos_token="<|done|>", added_tokens_decoder={"259": token}),
    )
    assert open_checkpoint(tied).ends.sources[259] == ("the tokenizer",)
    tokenizer = read_tokenizer(tied)
    assert tokenizer is not None
    assert tokenizer.encode("<|done|>").ids == [259]


def test_one_of_the_older_files_alone_is_no_tokenizer(tied: Path) -> None:
    older_files(tied)
    (tied / "merges.txt").unlink()
    assert read_tokenizer(tied) is None
    assert describe(tied).problems == ("tokenizer.json is missing: text cannot become token ids",)


def test_named_templates_are_copied_and_taken_by_name(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "c")
    (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("RAG {{ messages[0].content }}")
    assert run("export", checkpoint, "--output", tmp_path / "m", "--no-verify").exit_code == 0
    assert open_checkpoint(checkpoint).notes == ()
    model = qrun.open(tmp_path / "m", chat_template="rag")
    assert model.template is not None
    assert model.template.render([{"role": "user", "content": "x"}]) == "RAG x"
    assert model.template.names == ("default", "rag")
    default = qrun.open(tmp_path / "m").template
    assert default is not None
    assert default.render([{"role": "user", "content": "x"}]).startswith("<|im_start|>user\nx")
    with pytest.raises(qrun.QrunError, match="no chat template is called 'tools', only 'default', 'rag'"):
        qrun.open(tmp_path / "m", chat_template="tools")


def test_a_template_is_chosen_on_the_command_line(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "c")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    assert run("export", checkpoint, "--output", tmp_path / "m", "--no-verify").exit_code == 0
    ask = ["generate", "--engine", str(tmp_path / "m"), "--prompt", "abc", "--max-tokens", "1", "--json"]
    tokens = {}
    for name in ("default", "short"):
        answer = CliRunner().invoke(qrun_main, [*ask, "--chat-template", name])
        assert answer.exit_code == 0, answer.output
        tokens[name] = json.loads(answer.stdout)["prompt_tokens"]
    assert tokens["short"] == 3 < tokens["default"]
    refused_ = CliRunner().invoke(qrun_main, [*ask, "--chat-template", "long"])
    refused(refused_, "no chat template is called 'long', only 'default', 'short'")
    assert CliRunner().invoke(qrun_main, [*ask, "--raw", "--chat-template", "short"]).exit_code == 2
