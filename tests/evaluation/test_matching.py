"""If these fail, right answers count as wrong ones, or wrong ones as right."""

from __future__ import annotations

import pytest

from qrun.evaluation.matching import contains, fits, is_exact


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("The capital is Rome.", "Rome", True),
        ("the capital is ROME", "rome", True),
        ("Romeo and Juliet", "Rome", False),
        ("It is 4.", "4", True),
        ("It is 14.", "4", False),
        ("It is 41.", "4", False),
        ("It is 4.5", "4", False),
        ("It is 3.4", "4", False),
        ("It is 4,000", "4", False),
        ("4, of course", "4", True),
        ("the 4th", "4", True),
        ("It is 14, no, 4", "4", True),
        ("New\n  York City", "new york", True),
        ("答案是巴黎。", "巴黎", True),
        ("Это Москва.", "Москва", True),
        ("Это Москвариум", "Москва", False),
        ("ｆｕｌｌ width", "full", True),
        ("C++ and C", "C++", True),
        ("", "Rome", False),
    ],
)
def test_an_answer_contains_whole_words_and_numbers_only(answer, expected, found):
    assert contains(answer, expected) is found


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        (" Yes \n", "yes", True),
        ("yes, of course", "yes", False),
        ("New  York", "new york", True),
        ("STRASSE", "straße", True),
    ],
)
def test_an_exact_answer_is_the_whole_text_but_for_case_and_blanks(answer, expected, found):
    assert is_exact(answer, expected) is found


def test_an_expression_is_searched_as_it_stands():
    assert fits("It ended in 1945.", r"\b1945\b")
    assert not fits("ROME", "rome")
    assert fits("ROME", "(?i)rome")
