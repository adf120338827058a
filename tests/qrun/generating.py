"""``qrun generate`` with a fake model, run by test_console: generating.py FOLDER ANSWER OPTION..."""

from __future__ import annotations

import sys
from pathlib import Path

from qrun.cli import options
from qrun.cli.main import main
from tests.fakes import fake_manifest, fake_model, scripted, tiny_tokenizer

folder, answer, *given = sys.argv[1:]
tokenizer = tiny_tokenizer(Path(folder))
# The prompt is the beginning of an answer: in a chat it is the second one of what the model reads.
rule = scripted(tokenizer, [answer, answer])
model = fake_model(tokenizer, rule, manifest=fake_manifest(context_length=4096))
options.Model.open = lambda *_, **__: model
main(["generate", "--engine", "x", "--prompt", "<|im_start|>assistant\n", *given])
