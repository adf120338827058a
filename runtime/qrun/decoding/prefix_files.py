"""A prefix cache on the disk, so that what begins alike need not be read again after a restart.

One file holds the blocks of one model as one version of ONNX Runtime computes them on one kind of machine:
others would give other bits, so they have files of their own. A file that does not read back is removed, and
the cache begins empty.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.session import Session
from qrun.decoding.prefix_cache import PrefixCache
from qrun.errors import QrunError

_log = logging.getLogger("qrun.engine")
_FORMAT = b"qrun prefixes 2"  # 2: pieces of prompts are shorter behind many tokens
_NAME_BYTES = 20
_HEADER_BYTES = 256  # what numpy writes before an array, at most


def prefix_file(folder: Path, session: Session, grain: int, chunk: int) -> Path:
    """The file of this model on this machine; it need not exist."""
    manifest, known = session.manifest, hashlib.blake2b(_FORMAT, digest_size=16)
    graphs = sorted((each.path, each.sha256) for each in manifest.files if ".onnx" in each.path)
    facts = (
        graphs,
        manifest.kv.dtype,
        grain,
        chunk,
        session.device,
        _versions(),
        platform.machine(),
        _processor(),
    )
    known.update(repr(facts).encode())
    return folder / f"qrun-prefixes-{known.hexdigest()}.npz"


def check_folder(folder: Path) -> None:
    """Make the folder, and see that files can be written there: they are written when the server ends.

    Raises:
        QrunError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise QrunError(
            f"beginnings of prompts cannot be kept there: {error.strerror}",
            where=folder,
            hint="give another --prefix-cache-dir",
        ) from None


def save_prefixes(prefixes: PrefixCache, path: Path) -> None:
    """Write all blocks, the least recently used first; an earlier file is replaced once this one is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".qrun-prefixes-", delete=False) as draft:
            try:
                arrays: dict[str, Any] = {name.hex(): np.stack(states) for name, states in prefixes.blocks()}
                np.savez(draft, **arrays)
                draft.close()
                Path(draft.name).replace(path)
            except BaseException:
                Path(draft.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        _log.warning("prefixes are not kept in %s: %s", path.parent, error.strerror)


def empty_states(session: Session) -> list[NDArray[Any]]:
    """Keys and values of no token, ``[kv_heads, 0, head_size]`` of each buffer."""
    cache = session.new_cache()
    cache.reserve(1)  # before that there are no buffers
    return cache.copy_out(0, 0, 0)


def load_prefixes(prefixes: PrefixCache, path: Path, like: list[NDArray[Any]]) -> None:
    """Take up the blocks of a file, as far as there is memory for them.

    Args:
        prefixes: empty.
        path: of ``prefix_file``.
        like: of ``empty_states``.
    """
    try:
        for name, block in _blocks(path, prefixes.grain, like):
            prefixes.put(name, list(block))
    except FileNotFoundError:
        return
    except PermissionError as error:
        _log.warning("prefixes in %s are not read: %s", path, error.strerror)
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds of errors for damaged bytes
        prefixes.clear()
        try:
            path.unlink(missing_ok=True)
        except OSError as failure:  # such as a folder of that name
            _log.warning("%s cannot be read, and not be removed: %s", path, failure.strerror)
        else:
            _log.warning("%s was damaged and is removed: %s", path, error)


def _blocks(path: Path, grain: int, like: list[NDArray[Any]]) -> Iterator[tuple[bytes, NDArray[Any]]]:
    shape, dtype = (len(like), *(length or grain for length in like[0].shape)), like[0].dtype
    most = int(np.prod(shape)) * dtype.itemsize + _HEADER_BYTES
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            # Before it is read: a damaged length must not ask for all of the memory.
            if archive.zip.getinfo(f"{name}.npy").file_size > most:
                raise ValueError(f"the block {name} is too large")
            digest, block = bytes.fromhex(name), archive[name]
            if len(digest) != _NAME_BYTES or block.shape != shape or block.dtype != dtype:
                raise ValueError(f"the block {name} is of another model")
            yield digest, block


def _versions() -> list[str]:
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """What decides on the kernels, and so on the last bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
