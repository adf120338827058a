"""docs/commands.md, made from the commands themselves: ``python -m tests.docs.commands_page`` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from qconvert.cli import main as qconvert
from qrun.cli.main import main as qrun

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "commands.md"
PROGRAMS: dict[str, click.Group] = {"qconvert": qconvert, "qrun": qrun}
# Options that several commands share are told once, if there are at least as many of them as this.
FEWEST_SHARED = 3

_HEAD = """\
# Commands and options

Made from the programs themselves by `python -m tests.docs.commands_page`; a test compares. `-h` and
`--help` show the same in a terminal. Exit codes: 0 done, 1 refused or failed, 2 a wrong command line,
130 after Ctrl-C.
"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, such as ``qrun chat``."""
    for program, group in PROGRAMS.items():
        for name in sorted(group.commands):
            yield f"{program} {name}", group.commands[name]


def options_of(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def names_of(option: click.Option) -> str:
    """``-o, --output PATH`` or ``--verify / --no-verify``, as --help writes them."""
    record = option.get_help_record(click.Context(click.Command("any")))
    assert record is not None, option.name
    return record[0]


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for program in PROGRAMS:
        mine = [(name, command) for name, command in commands() if name.startswith(f"{program} ")]
        shared = _shared(mine)
        for name, command in mine:
            parts.append(_section(name, command, shared))
        for owners, rows in shared.items():
            parts.append(f"## Shared by {_listed(owners)}\n\n{_table(rows)}")
    return "\n".join(parts)


def _shared(mine: list[tuple[str, click.Command]]) -> dict[tuple[str, ...], list[tuple[str, str]]]:
    owners: dict[tuple[str, str], list[str]] = {}
    for name, command in mine:
        for option in options_of(command):
            owners.setdefault(_row(option), []).append(name)
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for row, names in owners.items():
        if len(names) > 1:
            groups.setdefault(tuple(names), []).append(row)
    return {names: rows for names, rows in groups.items() if len(rows) >= FEWEST_SHARED}


def _section(name: str, command: click.Command, shared: dict[tuple[str, ...], list[tuple[str, str]]]) -> str:
    arguments = [
        parameter.human_readable_name
        for parameter in command.params
        if parameter.param_type_name == "argument"
    ]
    told = {row: names for names, rows in shared.items() for row in rows}
    own = [row for option in options_of(command) if (row := _row(option)) not in told]
    lines = [f"## `{' '.join([name, *arguments, '[OPTIONS]'])}`", "", _paragraphs(command.help or "")]
    elsewhere = [names for names in shared if name in names]
    if elsewhere:
        lines += ["", "Also the options shared by " + "; and by ".join(map(_listed, elsewhere)) + ", below."]
    lines += ["", _table(own)]
    return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _row(option: click.Option) -> tuple[str, str]:
    record = option.get_help_record(click.Context(click.Command("any")))
    assert record is not None, option.name
    names, text = record
    return names, re.sub(r"\s+", " ", text)


def _table(rows: list[tuple[str, str]]) -> str:
    lines = ["| option | |", "|---|---|"]
    lines += [
        f"| `{names.replace('|', chr(92) + '|')}` | {text.replace('|', chr(92) + '|')} |"
        for names, text in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
