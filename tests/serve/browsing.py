"""The pages in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
browser_needed = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def answers(page, count: int) -> list[str]:
    """The texts of so many complete answers."""
    page.wait_for_function(
        "n => document.querySelectorAll('.assistant').length === n && !document.querySelector('.coming')",
        arg=count,
    )
    return page.locator(".assistant .body").all_inner_texts()
