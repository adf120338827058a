"""Tests of the server that cannot be asked of one in another process, and why."""

from __future__ import annotations

from collections.abc import Collection

from tests.fakes import REPOSITORY

_PATCHED = "changes the server's code, in the test's own process"
_WATCHED = "watches what happens within the server, in the test's own process"
_COMMAND = "starts `qrun serve` itself; test_deploy.py starts `qrun deploy`"
_WITHOUT = "asks no server"
# By file, or by file and test.
APART: dict[str, str] = {
    "tests/serve/test_bad_requests.py::test_a_fault_of_the_server_would_be_seen": _PATCHED,
    "tests/serve/test_bad_requests.py::test_the_docs_count_the_kinds_of_bad_input": _WITHOUT,
    "tests/serve/test_forms.py::test_one_that_becomes_too_complex_ends_its_own_answer_and_no_other": _PATCHED,
    "tests/serve/test_honoured.py::test_a_field_reaches_the_sampler": _WATCHED,
    "tests/serve/test_honoured.py::test_several_answers_have_seeds_of_their_own": _WATCHED,
    "tests/serve/test_lazy.py": "opens models while the server runs: a replica opens its one model before",
    "tests/serve/test_limits.py::test_one_that_is_still_reading_or_waiting_is_refused_and_its_slot_free": (
        "holds the model up from the test's own process"
    ),
    "tests/serve/test_many_at_once.py::test_a_long_system_message_is_read_once_for_all_who_begin_with_it": (
        _WATCHED
    ),
    "tests/serve/test_many_at_once.py::test_work_on_a_long_text_holds_up_nobody": _PATCHED,
    "tests/serve/test_mutated_requests.py": _WITHOUT,
    "tests/serve/test_operator.py": _COMMAND,
    "tests/serve/test_other_tools.py::test_a_message_has_a_block_for_each_text_and_call": _WATCHED,
    "tests/serve/test_other_tools.py::test_a_response_has_an_item_for_each_text_and_call": _WATCHED,
    "tests/serve/test_other_tools.py::test_none_and_single_calls_in_a_message": _WATCHED,
    "tests/serve/test_other_tools.py::test_none_and_single_calls_in_a_response": _WATCHED,
    "tests/serve/test_other_tools.py::test_results_go_back_into_a_message": _WATCHED,
    "tests/serve/test_other_tools.py::test_results_go_back_into_a_response": _WATCHED,
    "tests/serve/test_process.py": _COMMAND,
    "tests/serve/test_promises.py": _WITHOUT,
    "tests/serve/test_sample.py": _COMMAND,
    "tests/serve/test_scoring.py::test_logits_are_never_computed_for_more_than_a_piece": _PATCHED,
    "tests/serve/test_soak.py": _COMMAND,
    "tests/serve/test_speculate.py": _PATCHED,
    "tests/serve/test_tools.py::test_results_go_back_through_the_template": _WATCHED,
}


def stale(collected: Collection[str]) -> list[str]:
    """Names of the list that are no tests any more, in files that were collected or are gone."""
    files = {name.partition("::")[0] for name in collected}
    return [
        name
        for name in APART
        if not (REPOSITORY / name.partition("::")[0]).is_file()
        or ("::" in name and name.partition("::")[0] in files and name not in collected)
    ]
