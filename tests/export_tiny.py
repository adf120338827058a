"""Exports a tiny checkpoint: ``python -m tests.export_tiny FOLDER OPTIONS``, a JSON object of two.

For test runs in environments without torch, which ask the one that has it (``QCONVERT_TEST_PYTHON``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def export_tiny(root: Path, options: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Path:
    """The exported folder ``root/model`` of a checkpoint ``root/tiny``, not verified."""
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress
    from tests.tiny import make_tiny_checkpoint

    source = make_tiny_checkpoint(root / "tiny", **checkpoint)
    asked = ExportOptions(**options, output=root / "model", verify=False)
    return export(str(source), asked, Progress(quiet=True)).folder


if __name__ == "__main__":
    export_tiny(Path(sys.argv[1]), **json.loads(sys.argv[2]))
