"""What a terminal of 80 columns shows of both programs: nothing is cut off."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from qconvert.proof.report_view import _perplexity
from tests.docs.commands_page import PROGRAMS, commands


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_is_told_in_a_whole_sentence(program: str) -> None:
    """Summaries of commands ended in "..." in the middle of a sentence."""
    done = CliRunner().invoke(PROGRAMS[program], ["--help"], terminal_width=80)
    assert done.exit_code == 0
    assert "..." not in done.output.split("Commands:")[1]


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_help_fits_80_columns(name: str, command: object) -> None:
    program, sub = name.split()
    done = CliRunner().invoke(PROGRAMS[program], [sub, "--help"], terminal_width=80)
    assert max(map(len, done.output.splitlines())) <= 80


def test_a_perplexity_of_the_order_of_a_vocabulary_keeps_its_column_narrow() -> None:
    """The table of a random model with 151,936 tokens had cut off the heads of its columns ("toke…")."""
    assert len(_perplexity(1_276_589.89, 194_698.81, 2)) <= len("377.16 (387.43)") + 4
    assert _perplexity(31.98, 31.86, 2) == "31.98 (31.86)"
