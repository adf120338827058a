"""Commands of both programs in a process that may read no more than files' modes say, even as root."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tests.fakes import REPOSITORY

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


@dataclass(frozen=True)
class Done:
    """How a command ended; ``error`` is an exception that nobody has turned into a message."""

    exit_code: int
    output: str
    error: str | None


def commands(*lines: Sequence[object]) -> list[Done]:
    """Run commands, the first word of each "qrun" or "qconvert", one after another in one process."""
    given = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run(
        [sys.executable, "-m", "tests.unprivileged", given],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        preexec_fn=_drop,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Done(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _drop() -> None:
    # Without effect for an ordinary user, who has no such capabilities.
    libc = ctypes.CDLL(None)
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def _main() -> None:
    from click.testing import CliRunner

    ended = []
    for program, *arguments in json.loads(sys.argv[1]):
        if program == "qrun":
            from qrun.cli.main import main
        else:
            from qconvert.cli import main
        result = CliRunner().invoke(main, arguments)
        bug = result.exception is not None and not isinstance(result.exception, SystemExit)
        error = repr(result.exception) if bug else None
        ended.append({"exit_code": result.exit_code, "output": result.output, "error": error})
    print(json.dumps(ended))


if __name__ == "__main__":
    _main()
