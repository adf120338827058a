"""The way of an output to its name: nobody's file is overwritten, and a kill leaves it whole or not there."""

from __future__ import annotations

from pathlib import Path

from qrun.batch.journal import Journal
from qrun.batch.order import Order
from qrun.batch.outputs import changed_meanwhile
from qrun.errors import QrunError


def check_output(order: Order) -> None:
    output = order.output
    if output.is_dir():
        raise QrunError("the output is a folder", where=output, hint="give the name of a file")
    if not output.parent.is_dir():
        raise QrunError("there is no such folder", where=output.parent, hint="make it, or choose another")
    if output.is_symlink() and not output.exists():
        raise QrunError(
            "the output is a link to nowhere", where=output, hint="remove it, or give another name"
        )
    if output.exists() and not output.is_file():
        raise QrunError("the output is no file", where=output, hint="give the name of a file")
    if order.input is not None:
        if not order.input.exists():
            raise QrunError("there is no such input", where=order.input)
        if order.input.is_dir():
            raise QrunError("the input is a folder", where=order.input, hint="give a file")
        if not (order.input.is_file() or order.input.is_fifo()):
            raise QrunError("the input is no file", where=order.input, hint="give a file, or - for a pipe")
        if output.exists() and order.input.samefile(output):
            raise QrunError("the output is the input", where=output, hint="give another --output")


def check_unpublished(output: Path, journal: Journal, replaces: list[int] | None) -> None:
    """Refuse an output that is there and should not be.

    Args:
        output: of a job that is not finished.
        journal: the job's.
        replaces: the ``identity`` of the file that the job shall replace.

    Raises:
        QrunError: it is neither that file nor what this job has published.
    """
    if output.exists() and not is_published(output, journal) and identity(output) != replaces:
        raise changed_meanwhile(output)


def is_published(output: Path, journal: Journal) -> bool:
    """Whether the output is this job's own: a second name of the file in its folder."""
    whole = journal.path("output")
    return whole.exists() and output.exists() and whole.samefile(output)


def publish(output: Path, journal: Journal, replaces: list[int] | None) -> None:
    """Give the whole output in the job's folder its name, by one step.

    Raises:
        QrunError: see ``check_unpublished``.
    """
    check_unpublished(output, journal, replaces)
    whole, new = journal.path("output"), journal.path("output.new")
    new.unlink(missing_ok=True)
    try:
        new.hardlink_to(whole)
    except OSError:  # a disk without links: a kill in this moment leaves it published, and the job unfinished
        whole.replace(output)
        return
    if replaces is not None:
        new.replace(output)
    else:
        _link(new, output)


def _link(new: Path, output: Path) -> None:
    """Give the file its name, unless somebody has that name meanwhile."""
    try:
        output.hardlink_to(new)
    except FileExistsError:
        raise changed_meanwhile(output) from None
    new.unlink()


def identity(path: Path) -> list[int]:
    """What tells whether a file is still the same one."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]
