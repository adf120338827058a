"""What a verification reads, and the ways in which it goes through a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.proof.cases import LONG_TOKENS, make_cases
from qconvert.proof.paths import CHUNKED, CHUNKED_GROWING, LAST, STEPPED, TRIMMED_BACK, PathReader
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
    assert len(found.greedy_prompt) + found.greedy_steps == 100
    assert any(note.startswith("greedy: 68 steps") for note in found.notes)


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


@pytest.mark.parametrize(
    ("path", "first"), [(CHUNKED, 0), (CHUNKED_GROWING, 0), (STEPPED, 135), (TRIMMED_BACK, 176), (LAST, 199)]
)
def test_a_reader_gives_each_position_its_own_row(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, first: int
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
    assert seen == list(range(first, 200))
