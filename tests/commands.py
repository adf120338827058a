"""The ``qrun`` command in this process, and what a refusal of it must look like."""

from __future__ import annotations

from click.testing import CliRunner, Result

from qrun.cli import main as cli


def runner() -> CliRunner:
    """Streams apart: click before 8.2 mixes them unless told, and from 8.2 on does not know the option."""
    try:
        return CliRunner(mix_stderr=False)
    except TypeError:
        return CliRunner()


def qrun(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return runner().invoke(cli.main, [str(argument) for argument in arguments], input=stdin)


def refused(result: Result, code: int = 1) -> str:
    """The message of a refusal: on stderr alone, without a traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr
