"""How a command imports the libraries of the export: together, and without looking for garbage meanwhile.

torch and transformers make a million objects that stay. The collector looks through them again and again
while they are imported, and later whenever enough others were made: a tenth of the time that an export of a
0.5B takes.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """What is imported inside is never looked at by the garbage collector; for a process of our own only.

    Nothing is done where torch was imported before: whoever did that may have garbage that is to be found.

    Raises:
        ModuleNotFoundError: a library of the export is not installed.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        import transformers.modeling_utils  # noqa: F401

        yield
        gc.freeze()
    finally:
        gc.enable()
