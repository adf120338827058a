"""If these fail, a batch is compared by another list than its peers', or by tokens that nobody has made."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from benchmarks import batch
from benchmarks.compare.records import Records, StepFailedError
from benchmarks.serving.servers import Server
from tests.fakes import fake_manifest, fake_model, repeating, tiny_tokenizer
from tests.serve.serving import serving


def test_everybody_gets_the_same_list():
    prompts = batch.prompts_of(50, 1)
    assert prompts == batch.prompts_of(50, 1) != batch.prompts_of(50, 2)
    assert all(100 <= len(each.ids) <= 600 and 32 <= each.new <= 128 for each in prompts)
    bodies = [json.loads(line)["body"] for line in batch.batch_lines(prompts).splitlines()]
    assert [(body["prompt"], body["max_tokens"]) for body in bodies] == [(p.ids, p.new) for p in prompts]
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in bodies)


def test_a_server_that_answers_less_than_was_asked_is_not_fast(tmp_path, monkeypatch):
    from contextlib import nullcontext

    tokenizer = tiny_tokenizer(tmp_path)
    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=512))
    prompts = [batch.Prompt([1, 2, 3] * 30, 5), batch.Prompt([4, 5] * 50, 9)]
    with serving({"model": model}) as url:
        monkeypatch.setattr(batch, "running", lambda server: nullcontext(url))
        found = batch.measure_server(Server("any", ()), prompts)
        assert (found["new"], found["read"]) == (14, 190)
        prompts[1] = batch.Prompt([1] * 510, 9)  # the context ends before
        with pytest.raises(StepFailedError, match="new tokens and not 14"):
            batch.measure_server(Server("any", ()), prompts)


def test_the_report_compares_rounds_that_both_have(tmp_path):
    def contender(title: str, ours: bool) -> batch.Contender:
        return batch.Contender(title, ours, "-", lambda prompts: {})

    both = [contender("qrun batch x", True), contender("peer", False), contender("late", False)]
    arguments = Namespace(rounds=2, prompts=10, threads=2, shape="0.5B")
    records = Records(tmp_path)
    for who, number, seconds in ((0, 1, 2.0), (0, 2, 4.0), (1, 1, 4.0)):
        key = batch.key_of(both[who], arguments, number)
        records.once("batch", key, lambda s=seconds: {"seconds": s, "new": 100, "read": 300, "rows": 8})
    facts = {
        "date": "today",
        "machine": {
            **{"cpu": "any", "cores": 2, "extensions": [], "memory_bytes": None},
            **{"system": "Linux", "load_average_at_start": 0.0},
        },
        "versions": {},
    }
    text = batch.report(arguments, both, records, facts)
    assert "| qrun batch x | - | 8 | 37.5 (25.0 to 50.0) | 150 (100 to 200) |" in text
    assert "| late | - | not measured |  |  |" in text
    assert "| qrun batch x | peer | 2.00 | 1.3 | yes |" in text
