"""qconvert's errors: a kind of ``QrunError``, so that both programs report errors in one way."""

from qrun.errors import QrunError


class QconvertError(QrunError):
    """A checkpoint, an option or an environment from which no correct export can be made."""
