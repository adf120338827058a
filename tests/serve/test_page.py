"""The page at / in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from qrun.serve import pages
from tests.fakes import fake_model
from tests.serve.browsing import answers, browser_needed, say
from tests.serve.serving import serving

VENDORED = {
    "marked.umd.js": "bb95d4c15f1289f78486eaacebf3bb18688475ed58a040ef762ed49337090542",
    "purify.min.js": "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
}
EVIL = (
    "# Hi\n\n<script>window.bad=1</script><img src=x onerror='window.bad=1'>"
    "<svg onload='window.bad=1'></svg><a href='javascript:window.bad=1'>link</a> "
    "[two](javascript:window.bad=1) ![pixel](/health) <style>*{display:none}</style>"
    "<form action=/health><input name=a></form><b id=input style='position:fixed'>bold</b>\n\n```\nx = 1\n```"
)


@browser_needed
def test_a_conversation_with_figures_and_copies_outlives_a_reload(page):
    say(page, "hello **there**")
    assert answers(page, 1) == ["hello there"]
    assert page.locator(".assistant strong").inner_text() == "there"
    assert "tokens/s" in page.locator(".assistant .figures").inner_text()
    page.click("text=Copy >> nth=1")
    assert page.evaluate("navigator.clipboard.readText()") == "hello **there**"
    say(page, "again")
    answers(page, 2)
    page.click("#new")
    say(page, "another")
    answers(page, 1)
    page.reload()
    assert page.locator("#chats .name").all_inner_texts() == ["another", "hello **there**"]
    assert page.locator(".assistant .body").all_inner_texts() == ["another"]
    page.click("#chats .name >> nth=1")
    assert page.locator(".assistant .body").all_inner_texts() == ["hello there", "again"]
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete another']")
    assert page.locator("#chats .name").count() == 1


@browser_needed
def test_markup_and_scripts_in_messages_do_nothing(page):
    say(page, EVIL)
    answers(page, 1)
    body = page.locator(".assistant .body")
    assert body.locator("h1").inner_text() == "Hi"
    assert (
        body.locator("script, img, svg, style, form, input, [id], [onerror], [onload], b[style]").count() == 0
    )
    assert body.locator("a[href*=javascript]").count() == 0
    assert "<script>" in body.inner_text()  # as the model wrote it
    assert page.locator(".user .body").inner_text() == EVIL
    page.reload()
    page.wait_for_selector(".assistant h1")
    assert page.evaluate("window.bad") is None
    page.click("text=Copy >> nth=1")


@browser_needed
def test_an_answer_is_stopped_edited_resent_and_made_anew(page):
    page.select_option("#model", "long")
    say(page, "begin")
    page.wait_for_selector(".coming .body p")
    page.click("#stop")
    assert len(answers(page, 1)[0]) > 0
    assert "stopped" in page.locator(".figures >> nth=1").inner_text()
    page.select_option("#model", "echo")
    page.click("text=Edit")
    page.fill("[aria-label='Edited message']", "other")
    page.click("text=Resend")
    assert answers(page, 1) == ["other"]
    page.click("text=Regenerate")
    assert answers(page, 1) == ["other"]
    assert page.locator(".user").count() == 1


@browser_needed
def test_everything_is_reached_by_keyboard(page):
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    assert answers(page, 1) == ["one\ntwo"]
    page.select_option("#model", "long")
    page.focus("#input")
    page.keyboard.type("go")
    page.keyboard.press("Enter")
    page.wait_for_selector(".coming .body p")
    page.keyboard.press("Escape")
    answers(page, 2)
    assert page.evaluate("document.activeElement.id") == "input"
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.id || e.getAttribute('aria-label') || e.textContent)(document.activeElement)"
            )
        )
    for name in (
        "model",
        "open-settings",
        "theme",
        "new",
        "Copy message",
        "Edit message",
        "Regenerate answer",
        "input",
    ):
        assert name in reached
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "system"
    page.keyboard.press("Escape")
    assert not page.evaluate("document.getElementById('settings').open")
    names = "[...document.querySelectorAll('button, input, select, textarea')].filter(e => !(e.labels?.length"
    assert page.evaluate(names + " || e.getAttribute('aria-label') || e.textContent)).length") == 0


@browser_needed
def test_system_message_and_sampling_are_sent(page):
    page.click("#open-settings")
    page.fill("#system", "be brief")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=max_tokens]", "3")
    page.click("#settings >> text=Save")
    with page.expect_request("**/v1/chat/completions") as caught:
        say(page, "hello there friends")
    asked = caught.value.post_data_json
    assert asked["messages"][0] == {"role": "system", "content": "be brief"}
    assert (asked["temperature"], asked["max_tokens"]) == (0.5, 3)
    answers(page, 1)
    assert "cut off" in page.locator(".figures >> nth=1").inner_text()


@browser_needed
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (360, 640)])
def test_nothing_overflows_on_a_desk_or_a_phone(browser, address, theme, size):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=theme)
    page = context.new_page()
    page.goto(address)
    # A name as folders have them made the whole page wider than a phone.
    page.evaluate("document.querySelector('#model').add(new Option('Qwen2.5-1.5B-Instruct-onnx-int8', 'x'))")
    page.select_option("#model", "echo")
    say(
        page,
        "Some `code`:\n\n```\n"
        + "long " * 40
        + "\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- one\n- two\n\n"
        + "w" * 200,
    )
    answers(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    for name in ("#send", "#open-settings", "#theme", "#model"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
    if size[0] == 360:
        page.click("#menu")
        assert page.locator("#chats .name").is_visible()
        page.keyboard.press("Escape")
        assert not page.locator("#chats .name").is_visible()
    if size[0] == 360:
        other = context.new_page()
        other.goto(f"{address}/docs")
        assert other.locator("h1").is_visible()
        other.close()
    if folder := os.environ.get("QRUN_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{size[0]}-{theme}.png")
        page.click("#open-settings")
        page.screenshot(path=f"{folder}/{size[0]}-{theme}-settings.png")
        page.goto(f"{address}/docs")
        page.click("summary >> nth=0")
        page.screenshot(path=f"{folder}/{size[0]}-{theme}-docs.png")
    context.close()


@browser_needed
def test_the_page_of_the_api_tells_each_field_and_which_change_nothing(browser, address):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}/docs")
    route = page.locator("details", has=page.locator("summary", has_text="/v1/completions"))
    route.locator("summary").click()
    assert route.locator("tr", has_text="prompt_cache_key").inner_text().endswith("changes nothing.")
    assert "(required)" in route.locator("tr", has_text="model").inner_text()
    context.close()


@browser_needed
def test_a_key_is_asked_for_and_forgotten_with_the_tab(browser, served_tokenizer):
    with serving({"m": fake_model(served_tokenizer, lambda seen: 5)}, keys=("secret",)) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#settings[open]")
        assert "API key" in page.locator("#notice").inner_text()
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#model option", state="attached")
        assert page.locator("#notice").is_hidden()
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        assert "secret" in page.evaluate("JSON.stringify(sessionStorage)")
        context.close()


@browser_needed
def test_errors_of_the_api_are_words(browser, address):
    page = browser.new_context().new_page()
    page.goto(address)
    page.select_option("#model", "base")
    say(page, "hello")
    answers(page, 1)
    assert "no chat template" in page.locator(".wrong").inner_text()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click("text=Regenerate")
    page.wait_for_selector("text=The server does not answer")
    page.context.close()


@browser_needed
def test_a_full_store_is_told(page):
    page.evaluate("for (let i = 0; i < 100; i++) localStorage.setItem('qrun.chat.' + i, '{}')")
    say(page, "hello")
    answers(page, 1)
    assert "keeps no more" in page.locator("#notice").inner_text()


@browser_needed
def test_a_page_of_another_origin_reads_nothing(browser, address, served_tokenizer):
    with serving({"m": fake_model(served_tokenizer, lambda seen: 5)}) as other:
        page = browser.new_context().new_page()
        page.route(other, lambda route: route.fulfill(body="<p>evil</p>", content_type="text/html"))
        page.goto(other)
        ask = "address => fetch(address + '/v1/models').then(() => 'read', () => 'refused')"
        assert page.evaluate(ask, address) == "refused"


def test_vendored_files_are_as_published_and_go_with_their_licences(tmp_path):
    folder = Path(pages.__file__).parent / "page" / "vendor"
    for name, digest in VENDORED.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(Path(__file__).parents[2])], check=True)
    built = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(built).namelist())
    licences = {"vendor/LICENSE.marked", "vendor/LICENSE.dompurify", "vendor/README.md"}
    assert {f"qrun/serve/page/{each}" for each in licences | set(pages.FILES.values())} <= names


def test_every_file_that_the_pages_name_is_served(address):
    for path in pages.FILES:
        text = httpx.get(address + path).text
        for each in pages.FILES:
            if each.startswith("/page/") and each in text:
                assert httpx.get(address + each).status_code == 200
        if path.count("/") == 1:
            assert "http://" not in text
            assert " style=" not in text
            assert "<script>" not in text
