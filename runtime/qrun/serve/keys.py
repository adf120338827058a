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
    """Keys of a file, one a line, or of the variable. None of them is ever shown, also where it is refused.

    Raises:
        QrunError: the file holds none, is no text, or a key that no client could send.
    """
    if file is None:
        lines = os.environ.get(VARIABLE, "").split(",")
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise QrunError("the file of API keys is not UTF-8", where=file) from None
    keys = {number: line.strip() for number, line in enumerate(lines, 1)}
    keys = {number: key for number, key in keys.items() if key and not key.startswith("#")}
    for number, key in keys.items():
        if not (key.isascii() and key.isprintable()):
            raise QrunError(
                f"the API key in line {number} holds more than ASCII, which headers of HTTP cannot carry",
                where=file or VARIABLE,
                hint="make another one, such as with: openssl rand -hex 32",
            )
    if file is not None and not keys:
        raise QrunError("the file holds no API key", where=file, hint="write one key on each line")
    return tuple(keys.values())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
