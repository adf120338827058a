"""If this fails, we read AWQ's codes otherwise than AutoAWQ writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.making import awq_config, of_autoawq
from tests.formats.reading import same_as_the_library


@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_autoawq_packs_we_read(tmp_path: Path, group: int) -> None:
    same_as_the_library(
        tmp_path / "model", awq_config(group), lambda _, weight: of_autoawq(weight, group), "float16"
    )
