"""What a verification reads, and the ways in which it goes through a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof import paths
from qconvert.proof.cases import LONG_TOKENS, make_cases
from qconvert.proof.paths import PathReader, PromptPath
from qconvert.proof.report import Answer
from qconvert.proof.runs import answer_greedily
from qrun.backends.opening import open_session
from tests.qconvert.mutants import Exporter
from tests.tiny import make_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tied")


def test_cases_of_a_folder_with_a_tokenizer(checkpoint: Path) -> None:
    found = make_cases(checkpoint, 320, 4096)
    lengths = {case.name: len(case.token_ids) for case in found.cases}
    assert lengths == {"short": 32, "long": LONG_TOKENS, "chinese": 128, "code": 160}
    assert LONG_TOKENS >= 512
    assert found.notes == ()
    assert all(case.text for case in found.cases)


def test_random_tokens_where_there_is_no_tokenizer_or_not_this_model_s(
    checkpoint: Path, tmp_path: Path
) -> None:
    for folder, vocab_size in ((tmp_path, 320), (checkpoint, 100)):
        found = make_cases(folder, vocab_size, 4096)
        assert found == make_cases(folder, vocab_size, 4096)  # seeded
        assert "random tokens" in found.notes[0]
        assert not any(case.text for case in found.cases)
        assert max(max(case.token_ids) for case in found.cases) < vocab_size


def test_what_does_not_fit_the_context_is_said(checkpoint: Path) -> None:
    found = make_cases(checkpoint, 320, 100)
    assert {len(case.token_ids) for case in found.cases} == {32, 100}
    assert "long: cut to the context of 100 tokens" in found.notes
    assert len(found.greedy_prompts[0]) + found.greedy_steps == 100
    assert any(note.startswith("greedy: 68 steps") for note in found.notes)


def test_answers_end_as_a_user_gets_them_and_fill_all_steps(checkpoint: Path, tmp_path: Path) -> None:
    # Answers went on behind their end token, where a model says what chance makes it say: the sample
    # exported with int4, gptq, a graph for prompts and an int8 KV cache was refused for such a step.
    options = ExportOptions("fp32", output=tmp_path / "model", verify=False)
    session = open_session(export(str(checkpoint), options, Progress(quiet=True)).folder)
    cases = make_cases(checkpoint, 320, 256)
    assert len(set(cases.greedy_prompts)) > 20

    def answers(ends: tuple[int, ...]) -> list[Answer]:
        session.manifest = replace(session.manifest, eos_token_ids=ends)
        found, error = answer_greedily(session, cases, lambda _: None)
        assert error is None
        return found

    (whole,) = answers(())
    assert len(whole.tokens) == cases.greedy_steps == 128
    ends = whole.tokens[3:5]
    found = answers(ends)
    assert sum(len(answer.tokens) for answer in found) == cases.greedy_steps
    assert [answer.prompt for answer in found] == list(cases.greedy_prompts[: len(found)])
    assert len(found) > 1
    for answer in found:
        assert not set(ends) & set(answer.tokens[:-1])
        assert answer is found[-1] or answer.tokens[-1] in ends
    first = min(whole.tokens.index(end) for end in ends)
    assert found[0].tokens == whole.tokens[: first + 1]


class CountingSession:
    """Logits that tell their position: one-hot rows at the position's index, as the cache has it."""

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder)
        self.manifest = self._session.manifest

    def new_cache(self, **options: Any) -> Any:
        return self._session.new_cache(**options)

    def forward(self, token_ids: Any, cache: Any, logits: str = "last") -> Any:
        start = cache.length
        self._session.forward(token_ids, cache, "none")
        rows = np.eye(512, dtype=np.float32)[start : cache.length]
        return {"all": rows, "last": rows[-1:], "none": rows[:0]}[logits][None]


# The first position that has logits, for a prompt of 200 tokens.
FIRST = {
    paths.WHOLE: 0,
    paths.WHOLE_GROWING: 0,
    paths.LAST: 199,
    paths.CHUNKED: 0,
    paths.CHUNKED_GROWING: 0,
    paths.STEPPED: 135,
    paths.STEPPED_GROWING: 135,
    paths.TRIMMED_BACK: 176,
    paths.TRIMMED_BACK_GROWING: 176,
    paths.PROMPTED: 100,
    paths.FILLED: 135,
    paths.CHUNKED_STEPPED: 99,
    paths.TRIMMED_BACK_STEPPED: 176,
}


def test_every_path_is_tried_here() -> None:
    assert set(FIRST) == {value for value in vars(paths).values() if isinstance(value, PromptPath)}


@pytest.mark.parametrize("path", FIRST, ids=lambda path: path.name)
def test_a_reader_gives_each_position_its_own_row(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: PromptPath
) -> None:
    session = CountingSession(Exporter(checkpoint, tmp_path, monkeypatch).export("fp32"))
    reader = PathReader(path, session, list(range(200)))  # type: ignore[arg-type]
    seen = []
    for start in range(0, 200, 48):
        taken = reader.take(start, min(start + 48, 200))
        if taken is not None:
            begin, rows = taken
            assert rows.argmax(-1).tolist() == list(range(begin, begin + len(rows)))
            seen += rows.argmax(-1).tolist()
    assert seen == list(range(FIRST[path], 200))
