"""If these fail, a restart forgets what was kept, or a file on the disk changes answers or stops a start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qrun.answer import Answer
from qrun.decoding.pieces import PIECE
from qrun.decoding.prefix_cache import PrefixCache
from qrun.decoding.prefix_files import check_folder, load_prefixes, prefix_file, save_prefixes
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from qrun.text.tokenizer import Tokenizer
from tests.fakes import FakeSession, fake_manifest, fake_model

PROMPT = [7 + place % 40 for place in range(600)]
LIKE = [np.zeros((2, 0, 4), dtype=np.float32)] * 3


def made(count: int) -> PrefixCache:
    prefixes, generator = PrefixCache(1 << 30, 8), np.random.default_rng(0)
    for each in range(count):
        states = [generator.random((2, 8, 4), dtype=np.float32) for _ in range(3)]
        prefixes.put(bytes([each]) * 20, states)
    return prefixes


def read(path: Path, most_bytes: int = 1 << 30) -> PrefixCache:
    prefixes = PrefixCache(most_bytes, 8)
    load_prefixes(prefixes, path, LIKE)
    return prefixes


def test_what_is_written_is_read_back_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    prefixes, path = made(5), tmp_path / "new" / "kept.npz"
    save_prefixes(prefixes, path)
    found = read(path)
    assert [name for name, _ in found.blocks()] == [name for name, _ in prefixes.blocks()]
    for (_, states), (_, due) in zip(found.blocks(), prefixes.blocks()):
        assert all(np.array_equal(*pair) for pair in zip(states, due, strict=True))
    assert found.nbytes == prefixes.nbytes
    assert [each.name for each in path.parent.iterdir()] == ["kept.npz"]


def test_where_memory_is_short_the_latest_blocks_are_taken(tmp_path: Path) -> None:
    prefixes = made(5)
    save_prefixes(prefixes, tmp_path / "kept.npz")
    found = read(tmp_path / "kept.npz", prefixes.nbytes * 2 // 5)
    assert [name[0] for name, _ in found.blocks()] == [3, 4]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _other_shape(path: Path) -> None:
    np.savez(path, **{"00" * 20: np.zeros((3, 2, 9, 4), dtype=np.float32)})


def _other_type(path: Path) -> None:
    np.savez(path, **{"00" * 20: np.zeros((3, 2, 8, 4), dtype=np.float16)})


def _other_name(path: Path) -> None:
    np.savez(path, nothing=np.zeros((3, 2, 8, 4), dtype=np.float32))


def _huge(path: Path) -> None:
    np.savez_compressed(path, **{"00" * 20: np.zeros((3, 2, 1 << 20, 4), dtype=np.float32)})


def _pickle(path: Path) -> None:
    np.savez(path, **{"00" * 20: np.array([{}], dtype=object)})


def _text(path: Path) -> None:
    path.write_text("no archive")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [_cut, _flip, _other_shape, _other_type, _other_name, _huge, _pickle, _text, _empty]
)
def test_a_damaged_file_is_ignored_and_removed(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path, other = tmp_path / "kept.npz", tmp_path / "other"
    other.write_text("a user's")
    save_prefixes(made(5), path)
    damage(path)
    assert len(read(path)) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def _put(content: bytearray, header: bytes, field: int, value: int) -> None:
    """Set two bytes behind each of zip's headers of a kind."""
    at = content.find(header)
    while at >= 0:
        content[at + field : at + field + 2] = value.to_bytes(2, "little")
        at = content.find(header, at + 4)


@pytest.mark.parametrize(
    ("local", "central", "value"),
    [
        ((8, 10), 99, "a way to pack that is not known (NotImplementedError)"),
        ((8, 10), 8, "packed, and it is not (zlib.error)"),
        ((6, 8), 1, "a password (RuntimeError)"),
        ((4, 6), 200, "a later version of zip (NotImplementedError)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_of_any_kind_stops_no_start(
    tmp_path: Path, local: tuple[int, int], central: int, value: str
) -> None:
    """zipfile and zlib have errors of their own, which ended the server before it began."""
    path = tmp_path / "kept.npz"
    save_prefixes(made(2), path)
    content = bytearray(path.read_bytes())
    _put(content, b"PK\x03\x04", local[0], central)
    _put(content, b"PK\x01\x02", local[1], central)
    path.write_bytes(content)
    assert len(read(path)) == 0, value
    assert not path.exists()


def test_a_folder_in_its_place_stops_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kept.npz").mkdir()
    assert len(read(tmp_path / "kept.npz")) == 0
    assert "cannot be read, and not be removed" in caplog.text


@pytest.mark.parametrize("name", ["file", "file/within"])
def test_a_place_where_nothing_can_be_kept_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    """It was a line in the log when the server had ended, and all was forgotten."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QrunError, match="cannot be kept there"):
        check_folder(tmp_path / name)
    check_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    save_prefixes(made(1), tmp_path / "file" / "kept.npz")
    assert "prefixes are not kept" in caplog.text


def test_other_models_and_devices_have_files_of_their_own(tmp_path: Path) -> None:
    session = FakeSession(lambda _: 5)
    path = prefix_file(tmp_path, session, 64, 256)
    assert path == prefix_file(tmp_path, FakeSession(lambda _: 6), 64, 256)
    session.device = "another"
    assert prefix_file(tmp_path, session, 64, 256) != path
    assert prefix_file(tmp_path, FakeSession(lambda _: 5), 32, 256) != path
    assert prefix_file(tmp_path, FakeSession(lambda _: 5), 64, 128) != path  # other pieces have other bits


async def _answer(engine: Engine) -> Answer:
    *_, last = [event async for event in engine.answer(PROMPT, SamplingParams(max_tokens=4))]
    assert isinstance(last, Answer)
    return last


def test_after_a_restart_a_prompt_is_not_read_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        model = fake_model(
            tokenizer,
            lambda tokens: 5 + len(tokens) % 7,
            manifest=fake_manifest(context_length=1024),
        )
        with Engine(model, prefix_bytes=1 << 20, prefix_folder=tmp_path / "kept") as engine:
            answers.append(asyncio.run(_answer(engine)))
    first, second = answers
    assert second.token_ids == first.token_ids
    assert (first.reused_tokens, second.reused_tokens) == (0, (len(PROMPT) - 1) // PIECE * PIECE)
    assert len(list((tmp_path / "kept").iterdir())) == 1
