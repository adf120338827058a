"""qconvert's branch of the project's one error family."""

from qrun.errors import QrunError


class QconvertError(QrunError):
    """A checkpoint, an option or an environment from which no correct export can be made."""
