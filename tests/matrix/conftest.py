"""What the exports of every combination share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text for calibration, a token to each letter."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{number} bottles stand on the wall. " for number in range(100)))
    return str(file)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where an export goes; hundreds of them would fill the disk."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)
