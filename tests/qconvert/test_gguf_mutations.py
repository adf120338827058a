"""If this fails, a damaged GGUF file ends in a traceback or takes all memory; its number makes it again.

``QCONVERT_GGUF_MUTATIONS`` says how many are tried (``make test-mutations``: 5,000), or which, as 2500-5000;
some otherwise.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from qconvert.checkpoint.hub import resolve_source
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.cli import main
from qrun.errors import QrunError
from tests.qconvert.ggufs import make_gguf

FIRST, _, END = os.environ.get("QCONVERT_GGUF_MUTATIONS", "120").rpartition("-")
SEEDS = range(int(FIRST or 0), int(END))
# What one damaged file of half a megabyte may take, beyond what the process has.
ROOM = 256 << 20
_ODD = (0, 1, 2, 7, 8, 9, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)


def mutated(content: bytes, frame: int, seed: int) -> bytes:
    """One to four changes, most of them in the frame."""
    random_, changed = random.Random(seed), bytearray(content)
    for _ in range(random_.randint(1, 4)):
        place = random_.randrange(frame if random_.random() < 0.9 else len(changed))
        kind = random_.random()
        if kind < 0.25:
            changed[place] = random_.randrange(256)
        elif kind < 0.5:
            struct.pack_into("<Q", changed, min(place, len(changed) - 8), random_.choice(_ODD) % 2**64)
        elif kind < 0.65:
            struct.pack_into("<I", changed, min(place, len(changed) - 4), random_.choice(_ODD) % 2**32)
        elif kind < 0.75:
            del changed[place : place + random_.choice([1, 4, 8, 100])]
        elif kind < 0.83:
            changed[place:place] = bytes(random_.choice([1, 4, 8, 100]))
        elif kind < 0.9:
            other = random_.randrange(frame)
            size = random_.choice([4, 8, 40])
            changed[place : place + size] = changed[other : other + size]
        elif kind < 0.95:
            changed[place : place + 8] = b"\xff" * 8
        else:
            del changed[place:]
        if len(changed) < 64:
            break
        frame = min(frame, len(changed))
    return bytes(changed)


@contextmanager
def little_memory() -> Iterator[None]:
    """More than ``ROOM`` is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def failure(path: Path, *, inspect: bool) -> str | None:
    """The traceback of anything that is neither read nor refused."""
    folder = None
    try:
        with little_memory():
            folder = resolve_source(str(path))
            model = load_model(checkpoint := open_checkpoint(folder))
            assert model is not None
            for tensor in checkpoint.computed.values():
                tensor.rows(slice(0, 2))
    except QrunError:
        pass
    except BaseException:
        return traceback.format_exc()
    finally:
        if folder is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)
    if inspect:
        done = CliRunner().invoke(main, ["inspect", str(path)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return "".join(traceback.format_exception(done.exception))
    return None


@pytest.mark.timeout(3000)
def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    sources = [make_gguf(tmp_path, "qwen2", "Q8_0")[1], make_gguf(tmp_path, "qwen3", "Q4_1")[1]]
    contents = [path.read_bytes() for path in sources]
    frames = [content.index(b"output_norm.weight") + 4000 for content in contents]
    assert failure(sources[0], inspect=True) is None
    refused, path = 0, tmp_path / "damaged.gguf"
    for seed in SEEDS:
        index = seed % len(contents)
        path.unlink(missing_ok=True)
        path.write_bytes(mutated(contents[index], frames[index], seed))
        os.utime(path, ns=(seed, seed))
        found = failure(path, inspect=seed % 25 == 0)
        assert found is None, f"seed {seed}: {found}"
        try:
            shutil.rmtree(resolve_source(str(path)).parent)
        except QrunError:
            refused += 1
    assert len(SEEDS) / 4 < refused < len(SEEDS), "the damage does nothing, or is all of one kind"


def test_an_allocation_that_is_too_large_is_seen() -> None:
    with pytest.raises(MemoryError), little_memory():
        bytearray(2 * ROOM)
