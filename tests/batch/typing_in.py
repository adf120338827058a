"""``qrun batch`` typed in, in this process, over the model that repeats what it hears."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

import qrun.cli.batch
from qrun.cli.main import main


def type_in(monkeypatch: Any, model: Any, *arguments: object, piped: bytes | None = None) -> Result:
    """What the command prints, and its exit code."""
    monkeypatch.setattr(qrun.cli.batch, "open_model", lambda **options: model)
    given = ["batch", "--engine", "fake", *map(str, arguments)]
    return CliRunner().invoke(main, given, input=piped)
