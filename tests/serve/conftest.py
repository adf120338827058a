"""One server for the tests that do not change it, and one browser."""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest

from tests.fakes import IM_END, fake_manifest, fake_model, tiny_tokenizer
from tests.qrun.conftest import exporter, tiny_export  # noqa: F401
from tests.serve.browsing import CHROMIUM, FLAGS
from tests.serve.serving import serving


@pytest.fixture(scope="session")
def served_tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def address(served_tokenizer) -> Iterator[str]:
    """ "echo" says what the user said last and ends, "long" says "abcd…" for ever, "base" has no template."""
    header = served_tokenizer.encode("<|im_start|>assistant\n")
    letters = served_tokenizer.encode("abcdefghij")

    def echo(seen: list[int]) -> int:
        start = max(i for i in range(len(seen)) if seen[i : i + len(header)] == header)
        said = seen[start + len(header) :]
        asked = seen[:start]
        ends = [i for i, token in enumerate(asked) if token == IM_END]
        begin = max(i for i in range(ends[-1]) if asked[i] == asked[0]) + len(
            served_tokenizer.encode("<|im_start|>user\n")
        )
        wanted = [*asked[begin : ends[-1]], IM_END]
        return wanted[min(len(said), len(wanted) - 1)]

    def long(seen: list[int]) -> int:
        time.sleep(0.005)  # so that a reader has time to stop it
        return letters[len(seen) % len(letters)]

    manifest = fake_manifest(context_length=2048)
    models = {
        "echo": fake_model(served_tokenizer, echo, manifest=manifest),
        "long": fake_model(served_tokenizer, long, manifest=manifest),
        "base": fake_model(served_tokenizer, long, manifest=manifest, template=None),
    }
    with serving(models) as found:
        yield found


@pytest.fixture
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")  # while it is open no other test can use asyncio.run
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'"
    )
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser, address) -> Iterator:
    """The page with "echo" chosen; its console shows no fault and no breach of the policy."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    found, faults = context.new_page(), []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    found.set_default_timeout(10_000)
    found.goto(address)
    found.select_option("#model", "echo")
    yield found
    context.close()
    assert faults == []
