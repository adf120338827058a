"""If these fail, attention by groups gives other answers than the kernel, or is used where it must not be."""

from __future__ import annotations

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.backends.ort import cache as ort_cache
from qrun.backends.ort.attention import BY_GROUPS, pays_by_groups
from qrun.decoding.generate import Context, Token, generate
from qrun.sampling.params import SamplingParams

# Four query heads to a key/value head.
GROUPS = {"max_position_embeddings": 1024, "hidden_size": 128, "num_attention_heads": 8}
TOKENS = np.random.default_rng(3).integers(0, 256, (1, 620), dtype=np.int64)


def always(*_: int) -> bool:
    return True


def never(*_: int) -> bool:
    return False


def stepped(session, rows, steps: int):
    """Logits of the last ``steps`` tokens of every row, fed one by one, and what the cache holds then."""
    cache = session.new_cache(len(rows))
    for row, tokens in enumerate(rows):
        session.forward(tokens[None, :-steps], cache.rows(row, 1), "none")
    found = []
    for step in range(steps, 0, -1):
        fed = np.stack([tokens[len(tokens) - step][None] for tokens in rows])
        found.append(session.forward(fed, cache).copy())
    states = [cache.copy_out(row, 0, len(tokens)) for row, tokens in enumerate(rows)]
    return np.concatenate(found, 1), states


def test_both_ways_give_the_same_logits_and_the_same_cache(exporter, monkeypatch) -> None:
    session = open_session(exporter(**GROUPS), threads=2)
    rows = [TOKENS[0, :560]]
    monkeypatch.setattr(ort_cache, "pays_by_groups", never)
    whole, states = stepped(session, rows, 24)
    monkeypatch.setattr(ort_cache, "pays_by_groups", always)
    by_groups, written = stepped(session, rows, 24)
    np.testing.assert_allclose(by_groups, whole, atol=2e-4)
    assert not np.array_equal(by_groups, whole)  # else the input had no effect
    for row, others in zip(states, written):
        for one, other in zip(row, others):
            np.testing.assert_allclose(one, other, atol=2e-4)


def asked(session, monkeypatch) -> list[bool]:
    """What every run of the graph that decodes is asked for from now on."""
    found: list[bool] = []

    def flag(*, on: bool):
        found.append(on)
        return type(session.values).flag(session.values, on=on)

    monkeypatch.setattr(session.values, "flag", flag)
    return found


def test_a_long_row_goes_by_groups_and_what_else_there_is_does_not(exporter, monkeypatch) -> None:
    session = open_session(exporter(**GROUPS), threads=2)
    runs = asked(session, monkeypatch)
    cache = session.new_cache()
    session.forward(TOKENS[:, :560], cache)
    session.forward(TOKENS[:, 560:561], cache)  # the cache grows for it, by an eighth
    session.forward(TOKENS[:, 561:565], cache)  # several tokens
    session.forward(TOKENS[:, 565:566], cache)
    cache.trim(100)
    session.forward(TOKENS[:, 100:101], cache)  # short now, in a long cache
    assert runs == [False, True, False, True, False]


def test_a_row_among_others_gets_the_same_bits_in_any_company(exporter, monkeypatch) -> None:
    """Its attention depends on nobody's length, so it is the kernel's."""
    session = open_session(exporter(**GROUPS), threads=2)
    runs = asked(session, monkeypatch)
    rows = [TOKENS[0, :560], TOKENS[0, :300]]
    together, _ = stepped(session, rows, 4)
    beside_a_short_one, _ = stepped(session, [rows[0], TOKENS[0, :20]], 4)
    np.testing.assert_array_equal(together[0], beside_a_short_one[0])
    assert not runs


def test_an_answer_does_not_depend_on_what_the_cache_has_held(exporter, monkeypatch) -> None:
    """The capacity decides on the way, so it must follow from the request alone."""
    session = open_session(exporter(**GROUPS), threads=2)
    runs = asked(session, monkeypatch)
    params = SamplingParams(max_tokens=20)
    prompt, long = TOKENS[0, :520].tolist(), np.arange(900) % 250
    fresh, used = Context(session), Context(session)
    answers = [[event for event in generate(fresh, prompt, params) if isinstance(event, Token)]]
    by_itself = list(runs)
    for _ in generate(used, long.tolist(), params):
        pass
    runs.clear()
    answers.append([event for event in generate(used, prompt, params) if isinstance(event, Token)])
    assert answers[0] == answers[1]
    assert runs == by_itself
    assert True in runs
    assert used.cache.capacity == fresh.cache.capacity


@pytest.mark.parametrize(
    ("tokens", "places", "pays"),
    [(511, 512, False), (512, 512, True), (1000, 1250, True), (1000, 1251, False)],
)
def test_it_pays_for_long_rows_in_a_cache_that_is_nearly_full(tokens, places, pays) -> None:
    assert pays_by_groups(tokens, places) is pays


@pytest.mark.parametrize(
    "options",
    [{"int8_kv_cache": True}, {"num_key_value_heads": 4}],
    ids=["a cache of 8 bits", "groups of two"],
)
def test_graphs_without_a_choice_have_no_such_input(exporter, options) -> None:
    folder = exporter(**{**GROUPS, **options})
    session = open_session(folder, threads=2)
    inputs = session.manifest.raw["graph"]["inputs"]
    assert BY_GROUPS not in inputs
    rows = [TOKENS[0, :560]]
    logits, _ = stepped(session, rows, 2)
    assert np.isfinite(logits).all()


def test_other_programs_get_the_kernel(exporter) -> None:
    """The input has a default, so who does not know it need not give it: past comes back longer."""
    import onnxruntime

    session = open_session(exporter(**GROUPS), threads=2)
    inference = onnxruntime.InferenceSession(session.manifest.graph_path, providers=["CPUExecutionProvider"])
    given = {"input_ids": TOKENS[:, :5], "attention_mask": np.ones((1, 5), dtype=np.int64)}
    past = [entry for entry in inference.get_inputs() if entry.name.startswith("past_key_values")]
    given |= {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in past}
    logits, *present = inference.run(None, given)
    own = session.forward(TOKENS[:, :5], session.new_cache(), "all")
    np.testing.assert_allclose(logits, own, atol=2e-5)
    assert {states.shape[2] for states in present} == {5}
