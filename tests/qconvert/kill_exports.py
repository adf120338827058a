"""Run exports and kill them at random moments; used by test_killed_exports.py.

One process imports torch and transformers once and forks a child for each export, so that fifty of them
take seconds. Prints one line per state of the output folder that was found after a kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.folder.manifest import read_manifest


def state_of(output: Path) -> str:
    if not output.exists():
        return "absent"
    read_manifest(output).check_files(hashes=True)
    return "complete"


def main(checkpoint: Path, output: Path, kills: int, how: signal.Signals, seed: int) -> None:
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import qconvert.lowering.ort.decoder  # noqa: F401 - imported here so that no child pays for it

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job would ignore it
    options = ExportOptions(precision="int4", output=output, force=True, verify=False)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        export(str(checkpoint), options, Progress(quiet=True))
        os._exit(0)
    os.waitpid(child, 0)
    whole = time.monotonic() - started
    print(state_of(output), flush=True)

    chance = random.Random(seed)
    for round_number in range(kills):
        if round_number % 2:
            options = ExportOptions(
                precision=chance.choice(["int8", "int4"]), output=output, force=True, verify=False
            )
        child = os.fork()
        if child == 0:
            try:
                export(str(checkpoint), options, Progress(quiet=True))
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        time.sleep(chance.uniform(0, 1.2 * whole))
        os.kill(child, how)
        _, status = os.waitpid(child, 0)
        ended = "killed" if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 130 else "finished"
        print(state_of(output), ended, flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), signal.Signals[sys.argv[4]], int(sys.argv[5])
    )
