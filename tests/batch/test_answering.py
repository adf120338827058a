"""If these fail, a batch loses a line, answers one twice, or lets an answer depend on its neighbours."""

from __future__ import annotations

import openai.types.chat
import pytest

from qrun.batch.answering import Answerer
from qrun.batch.asking import Asking, Defaults
from qrun.batch.lines import Line, Problem
from qrun.call import EngineClosedError
from qrun.engine import Engine


def ask(number: int, text: str, **body) -> Line:
    return Line(number, body={"messages": [{"role": "user", "content": text}], **body})


def answers(model, lines, *, rows=4, defaults=None, **options):
    with Engine(model, slots=rows, queue=256 - rows) as engine:
        asking = Asking(engine, defaults, name="job")
        return {record.number: record for record in Answerer(asking, **options).answer(lines)}


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_every_line_is_answered_once_whatever_the_window(model, rows):
    lines = [ask(number, f"question {number} " * (number % 5 + 1)) for number in range(1, 90)]
    found = answers(model, iter(lines), rows=rows, window=20)
    assert sorted(found) == list(range(1, 90))
    for line in lines:
        assert found[line.number].text == line.body["messages"][0]["content"]
        assert found[line.number].finish_reason == "stop"


def test_an_answer_does_not_depend_on_rows_company_or_window(model):
    """Ids, times and cached tokens would: a restarted job could not end with the same bytes."""
    lines = [ask(n, "the same long beginning " * 8 + str(n), temperature=1.0) for n in range(1, 30)]
    together = answers(model, lines, rows=8)
    alone = {n: record for line in lines for n, record in answers(model, [line], rows=1).items()}
    assert together == alone
    ids = {record.body["id"] for record in together.values()}
    assert len(ids) == len(lines)


def test_a_body_is_what_openais_library_reads(model):
    found = answers(model, [ask(1, "hello", n=2)])[1]
    read = openai.types.chat.ChatCompletion.model_validate(found.body)
    assert [choice.message.content for choice in read.choices] == ["hello", "hello"]
    assert read.usage.total_tokens == found.prompt_tokens + found.completion_tokens


def test_what_cannot_be_asked_is_a_record_and_not_the_end(model):
    lines = [
        Line(1, problem=Problem("invalid_json", "line 1 is not JSON")),
        Line(2, "/v1/embeddings", {"input": "x"}),
        ask(3, "x", temperature=-1),
        ask(4, "x", stream=True),
        ask(5, "x", nonsense=1),
        ask(6, "long " * 600),
        Line(7, body={"messages": []}),
        ask(8, "fine"),
    ]
    found = answers(model, lines)
    assert {n: record.error for n, record in found.items()} == {
        **{1: "invalid_json", 2: "not_found", 3: "invalid_request", 4: "invalid_request"},
        **{5: "invalid_request", 6: "context_length_exceeded", 7: "invalid_request", 8: None},
    }
    assert {n: record.status for n, record in found.items() if n < 4} == {1: 0, 2: 404, 3: 400}
    assert found[5].body["error"]["param"] == "nonsense"
    assert found[8].text == "fine"


def test_defaults_fill_what_a_line_leaves_open(model):
    lines = [
        ask(1, "abcdefgh"),
        ask(2, "abcdefgh", max_tokens=2),
        Line(3, "/v1/completions", {"prompt": "abcdefgh"}),
        Line(4, "/v1/responses", {"input": "abcdefgh"}),
        Line(5, "/v1/messages", {"messages": [{"role": "user", "content": "abcdefgh"}]}),
    ]
    found = answers(model, lines, defaults=Defaults(max_tokens=4))
    assert {n: record.completion_tokens for n, record in found.items()} == {1: 4, 2: 2, 3: 4, 4: 4, 5: 4}
    assert found[4].body["output"][0]["content"][0]["text"] == found[4].text == "abcd"


def test_seeds_follow_from_the_lines_number(model):
    """Two lines with one prompt are sampled apart, and each the same again."""
    with Engine(model) as engine:
        asking = Asking(engine, Defaults(seed=1))
        seeds = [asking.prepare(ask(n, "x", n=2)).asked.params for n in (1, 2)]
        again = Asking(engine, Defaults(seed=1)).prepare(ask(2, "x", n=2)).asked.params
        other = Asking(engine, Defaults(seed=2)).prepare(ask(2, "x", n=2)).asked.params
        own = asking.prepare(ask(1, "x", seed=7)).asked.params
    assert len({params.seed for pair in seeds for params in pair}) == 4
    assert again == seeds[1]
    assert other[0].seed != again[0].seed
    assert own[0].seed == 7


def test_a_failed_step_is_tried_once_more(model):
    """A failed step fails all rows; a batch of hours would end with errors in lines that are not to blame."""
    session, broken = model.session, []
    forward = session.forward

    def once(*args):
        if len(session.fed) > 60 and not broken:
            broken.append(True)
            raise RuntimeError("the step breaks")
        return forward(*args)

    session.forward = once
    found = answers(model, [ask(n, f"question {n}") for n in range(1, 12)])
    assert broken
    assert [found[n].text for n in range(1, 12)] == [f"question {n}" for n in range(1, 12)]


def test_what_fails_again_is_an_error_record(model):
    """And its neighbours, who failed with it the first time, are answered."""
    (bad,) = model.tokenizer.encode("Z")
    forward = model.session.forward

    def breaks(token_ids, cache, logits="last"):
        if bad in token_ids[0].tolist():
            raise RuntimeError("the step breaks")
        return forward(token_ids, cache, logits)

    model.session.forward = breaks
    found = answers(model, [ask(n, "Z" if n == 4 else f"fine {n}") for n in range(1, 9)], rows=4)
    assert (found[4].error, found[4].status) == ("failed", 500)
    assert [found[n].text for n in range(1, 9) if n != 4] == [f"fine {n}" for n in range(1, 9) if n != 4]


def test_leaving_the_loop_cancels_what_runs(model):
    with Engine(model, slots=2) as engine:
        found = Answerer(Asking(engine)).answer(ask(n, f"text {n}") for n in range(1, 50))
        next(found)
        found.close()
        for _ in range(1000):
            if not engine.active + engine.queued:
                break
            next(Answerer(Asking(engine)).answer([ask(1, "x")]))
        assert engine.active + engine.queued == 0


def test_a_closed_engine_ends_the_batch(model):
    engine = Engine(model)
    engine.close()
    with pytest.raises(EngineClosedError):
        list(Answerer(Asking(engine)).answer([ask(1, "x")]))


def test_lines_with_one_beginning_read_it_once(model):
    shared = "a system prompt that all of them have, long enough for several blocks of tokens. " * 8
    lines = [ask(n, f"{n % 7}{'y' * 300}" if n % 2 else shared + str(n)) for n in range(1, 41)]
    with Engine(model, slots=4, prefix_bytes=1_000_000) as engine:
        list(Answerer(Asking(engine)).answer(lines))
        # 20 prompts share 600 tokens; what begins alike is found in pieces of 256.
        assert engine.prefix_hits >= 19 * 512
