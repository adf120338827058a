"""The ``qrun`` command in this process, and what a refusal of it must look like."""

from __future__ import annotations

from click.testing import CliRunner, Result

from qrun.cli import main as cli


def qrun(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], input=stdin)


def refused(result: Result, code: int = 1) -> str:
    """The message of a refusal: on stderr alone, without a traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr
