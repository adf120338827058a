"""If these fail, qrun does not start with a click that its bounds allow, or ONNX Runtime phones home."""

from __future__ import annotations

import subprocess
import sys


def test_the_command_starts_where_click_s_types_take_no_parameter() -> None:
    code = (
        "import click; click.ParamType.__class_getitem__ = None; click.types.ParamType = click.ParamType\n"
        "from qrun.cli.main import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_onnxruntime_s_telemetry_is_off_before_it_is_loaded() -> None:
    code = (
        "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
        "import qrun.backends.ort.session\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
