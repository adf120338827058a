"""Names of files as users give them, and as libraries need them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from qrun.errors import QrunError, as_refusal


def user_path(path: str | Path) -> Path:
    """The path that a user means, with ``~`` resolved.

    Raises:
        QrunError: no such home, a name that no file can have, or a place that the system does not show.
    """
    try:
        found = Path(path).expanduser()
        found.stat()
    except RuntimeError as error:
        raise QrunError(
            f"{path} names a home folder that does not exist",
            where=path,
            hint="write the path out, or put ./ before a name that begins with ~",
        ) from error
    except ValueError as error:
        raise QrunError(f"{str(path)!r} is no file name: {error}") from error
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller says what should be there
    except OSError as error:
        raise cast(QrunError, as_refusal(error)) from error
    return found


class RawPath(os.PathLike[bytes]):
    """A path for a library that takes bytes, whatever the locale and whether or not the name is UTF-8."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self._path)


def own_folder(variable: str, default: str) -> Path | None:
    """The user's folder for files of ours, as the XDG base directory specification says.

    Args:
        variable: the environment's name for it; a relative or empty value counts as not set.
        default: where it is below the user's home otherwise.

    Returns:
        The folder, or None for a user without a home.
    """
    set_to = os.environ.get(variable, "")
    if Path(set_to).is_absolute():
        return Path(set_to)
    home = os.environ.get("HOME")
    if home is None:
        try:
            home = str(Path.home())
        except RuntimeError:
            return None
    return Path(home) / default if Path(home).is_absolute() else None
