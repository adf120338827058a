"""API keys: where they stand, and where a server may do without."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from qrun.errors import QrunError

VARIABLE = "QRUN_API_KEYS"


def keys_for(host: str, file: Path | None, *, no_auth: bool) -> tuple[str, ...]:
    """The keys of a server that listens at an address.

    Raises:
        QrunError: there are none, and other machines reach it.
    """
    keys = read_keys(file)
    if not keys and not no_auth and not _is_loopback(host):
        raise QrunError(
            f"{host} can be reached from other machines, and there are no API keys",
            hint="give --api-key-file FILE, or --no-auth if everybody may ask",
        )
    return keys


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Keys of a file, one a line, or of the variable.

    Raises:
        QrunError: the file holds none.
    """
    if file is None:
        lines = os.environ.get(VARIABLE, "").split(",")
    else:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if file is not None and not keys:
        raise QrunError("the file holds no API key", where=file, hint="write one key on each line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
