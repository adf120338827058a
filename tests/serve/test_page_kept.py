"""The page keeps what was said: over a reload amid an answer, beside a second tab; not what was deleted."""

from __future__ import annotations

from tests.serve.browsing import answers, browser_needed, say

KEPT = "Object.keys(localStorage).filter(key => key.startsWith('qrun.chat.'))"


@browser_needed
def test_what_has_come_of_an_answer_is_there_after_a_reload(page):
    """It was an empty answer without a word that it had been cut off."""
    page.select_option("#model", "long")
    say(page, "begin")
    page.wait_for_function(f"() => JSON.parse(localStorage[{KEPT}[0]]).messages[1].content.length > 20")
    page.reload()
    assert len(page.locator(".assistant .body").inner_text()) > 20
    assert "not complete" in page.locator(".assistant .figures").inner_text()
    page.select_option("#model", "echo")
    page.click("text=Regenerate")
    assert answers(page, 1) == ["begin"]


@browser_needed
def test_a_conversation_that_is_deleted_amid_an_answer_stays_deleted(page):
    """Its answer, cut off by that, had kept it again."""
    page.select_option("#model", "long")
    say(page, "begin")
    page.wait_for_selector(".coming .body p")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete begin']")
    page.wait_for_selector("#send:not([hidden])")
    assert page.evaluate(KEPT) == []
    say(page, "other")
    page.click("#stop")
    assert page.locator("#chats .name").all_inner_texts() == ["other"]


@browser_needed
def test_two_tabs_show_the_same_conversation(page):
    """A message of the second tab was lost as soon as the first one sent another."""
    say(page, "one")
    answers(page, 1)
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#model option", state="attached")
    other.select_option("#model", "echo")
    say(other, "two")
    answers(other, 2)
    page.wait_for_function("() => document.querySelectorAll('.assistant').length === 2")
    say(page, "three")
    assert answers(page, 3) == ["one", "two", "three"]
    other.close()


@browser_needed
def test_the_field_grows_with_its_text(page):
    low = page.locator("#input").bounding_box()["height"]
    page.fill("#input", "word " * 200)
    high = page.locator("#input").bounding_box()["height"]
    assert high > 3 * low
    page.fill("#input", "line\n" * 400)
    assert page.locator("#input").bounding_box()["height"] <= 0.41 * page.viewport_size["height"]
    assert page.locator("#send").is_visible()
    page.press("#input", "Enter")
    answers(page, 1)
    assert abs(page.locator("#input").bounding_box()["height"] - low) < 2


@browser_needed
def test_columns_and_numbers_of_lists_are_as_the_answer_has_them(page):
    """The sanitiser took both for addresses that it should not let through."""
    say(page, "3. three\n4. four\n\n| a | b |\n|---|---:|\n| 1 | 2 |")
    answers(page, 1)
    assert page.locator(".assistant ol").get_attribute("start") == "3"
    assert page.locator(".assistant td >> nth=1").get_attribute("align") == "right"


@browser_needed
def test_thoughts_are_folded_away_from_the_answer(page):
    say(page, "<think>\nfirst <b>this</b>\n</think>\n\nthen **that**")
    page.wait_for_selector(".assistant .thought")
    assert answers(page, 1)[0].split() == ["Thoughts", "then", "that"]
    page.click(".thought summary")
    assert page.locator(".thought div").inner_text() == "first <b>this</b>"
    assert page.locator(".assistant strong").inner_text() == "that"
