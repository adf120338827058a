"""The tokenizer and the tiny exports of tests/qrun, and data files."""

from __future__ import annotations

from tests.qrun.conftest import broken, exporter, tiny_export, tokenizer  # noqa: F401
