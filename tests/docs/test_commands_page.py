"""docs/commands.md is what the programs say of themselves, and no page names an option that is not there."""

from __future__ import annotations

import shlex

import pytest

from tests.docs.bench import find_command
from tests.docs.commands_page import PAGE, commands, options_of, page
from tests.docs.reading import OURS, Place, mentions, pages
from tests.docs.reading import commands as commands_of_page

# Options of other programs that the pages name outside a command line.
OTHERS = {
    "--help",
    "--json",  # of our benchmarks too
    "--quick",
    "--work",
    "--retry-failed",
    "--memory-limit",
}
EVERY_OPTION = {
    name
    for _, command in commands()
    for option in options_of(command)
    for name in (*option.opts, *option.secondary_opts)
}
TYPED = [place for path in pages() for place in commands_of_page(path) if place.text.split()[0] in OURS]


def test_the_page_is_what_the_programs_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.docs.commands_page writes it anew"


def test_every_option_stands_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(EVERY_OPTION) > 40
    assert not [name for name in EVERY_OPTION if name not in text]


def test_every_option_that_a_page_names_exists() -> None:
    for path in pages():
        if path.parent.name == "benchmarks":
            continue  # test_pages_run.py reads these beside the programs' source
        other = {
            word
            for place in commands_of_page(path)
            if place.text.split()[0] not in OURS
            for word in place.text.split()
        }
        strange = [str(place) for place in mentions(path) if place.text not in EVERY_OPTION | OTHERS | other]
        assert not strange


@pytest.mark.parametrize("place", list({place.text: place for place in TYPED}.values()), ids=str)
def test_a_command_line_has_only_options_of_its_own_command(place: Place) -> None:
    command, words = find_command(shlex.split(place.text))
    assert command is not None
    known = {name for option in options_of(command) for name in (*option.opts, *option.secondary_opts)}
    assert not [word for word in words if word.startswith("-") and word != "-" and word not in known]
