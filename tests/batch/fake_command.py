"""``qrun batch`` with a model that costs nothing: ``python -m tests.batch.fake_command ARGS``, no --engine.

``QRUN_FAKE_STEP`` is the length of a step in seconds, so that a kill finds it amid its work.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import qrun.cli.batch
from qrun.cli.main import main
from qrun.model import Model
from tests.batch.fakes import echo_model
from tests.fakes import tiny_tokenizer


def fake_open_model(**options: object) -> Model:
    """The echo, whatever folder is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        model = echo_model(tiny_tokenizer(Path(folder)))
    if seconds := float(os.environ.get("QRUN_FAKE_STEP", "0")):
        forward = model.session.forward

        def slow(*given, **named):
            time.sleep(seconds)
            return forward(*given, **named)

        model.session.forward = slow
    return model


if __name__ == "__main__":
    qrun.cli.batch.open_model = fake_open_model
    main(["batch", "--engine", "fake", *sys.argv[1:]], prog_name="qrun")
