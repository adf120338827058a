"""Where a checkpoint comes from: a folder, the Hugging Face hub, or ModelScope."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from qconvert.checkpoint.gguf.marker import is_gguf
from qconvert.errors import QconvertError
from qrun.folder.paths import user_path

Hub = Literal["huggingface", "modelscope"]

# Everything an export reads, and nothing that could run: no pickles, no Python files.
ALLOWED_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt"]
_OF_A_CHECKPOINT = ("config.json", "adapter_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_source(source: str, *, hub: Hub = "huggingface", revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded into the hub's own cache where ``source`` is a hub id.

    Of a GGUF file it is a temporary one (``gguf/folder.py``).

    Args:
        source: an existing folder or GGUF file, or ``org/name``. Anything that looks like a path must exist.
        hub: which hub an id means.
        revision: branch, tag or commit of a hub id.

    Raises:
        QconvertError: no such folder, repository or revision; no access; no network.
        QrunError: see ``user_path``.
    """
    path = user_path(source)
    if source and path.exists():  # Path("") would be the current folder
        if revision is not None:
            raise QconvertError(f"A revision ({revision}) has no meaning for a folder.", where=source)
        return as_folder(path)
    if not _HUB_ID.fullmatch(source):
        raise QconvertError(
            f"There is no folder {source}.",
            hint="give an existing folder, or a hub id such as Qwen/Qwen2.5-0.5B",
        )
    if hub == "modelscope":
        return _from_modelscope(source, revision)
    return _from_huggingface(source, revision)


def as_folder(path: Path) -> Path:
    """The temporary folder of a GGUF file; any other path as it is.

    Raises:
        QconvertError: see ``gguf.folder.unpack``.
    """
    if not is_gguf(path):
        return path
    from qconvert.checkpoint.gguf.folder import unpack

    return unpack(path)


def _from_huggingface(repository: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    where = f"{endpoint.rstrip('/')}/{repository}"
    try:
        found = Path(snapshot_download(repository, revision=revision, allow_patterns=ALLOWED_FILES))
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError, so it comes first
        raise QconvertError(
            f"{repository} is gated.",
            where=where,
            hint="accept its terms on its page, then log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise QconvertError(
            f"There is no folder and no hub repository {repository}, or it is private.",
            where=where,
            hint="check the spelling; for a private repository log in with `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        what = f"{repository} has no revision {revision}."
        raise QconvertError(what, where=where, hint="give a branch, a tag or a full commit id") from error
    except HFValidationError as error:
        raise QconvertError(f"{repository} is no valid hub id: {error}", where=repository) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError, OSError) as error:
        reason = _first_line(error.__cause__ or error)
        raise QconvertError(
            f"{repository} is not in the cache and could not be downloaded: {reason}",
            where=where,
            hint="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give the folder of a copy",
        ) from error
    return _with_a_checkpoint(found, repository, where)


def _from_modelscope(repository: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise QconvertError(
            "ModelScope downloads need the `modelscope` package, which is not installed.",
            hint="pip install 'qconvert[modelscope]', or pip install modelscope",
        ) from error
    where = f"modelscope.cn/models/{repository}"
    try:
        found = Path(snapshot_download(repository, revision=revision, allow_patterns=ALLOWED_FILES))
    except Exception as error:  # the package raises requests', its own and plain errors alike
        raise QconvertError(
            f"ModelScope could not deliver {repository}: {_first_line(error)}",
            where=where,
            hint="check the spelling, the revision and the network",
        ) from error
    return _with_a_checkpoint(found, repository, where)


def _with_a_checkpoint(folder: Path, repository: str, where: str) -> Path:
    """The folder of a download, which does not exist where no file of the repository was wanted."""
    if any((folder / name).is_file() for name in _OF_A_CHECKPOINT):
        return folder
    holds = "it seems to hold GGUF files" if "gguf" in repository.lower() else "it holds no checkpoint"
    raise QconvertError(
        f"{repository} has no config.json: {holds}.",
        where=where,
        hint="download one GGUF file of it (for a split one all its parts), and give its path",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
