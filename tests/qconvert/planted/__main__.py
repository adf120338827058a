"""Plant every kind of error into exports of one checkpoint, and print what caught each."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.qconvert.planted.table import (
    ABSENT,
    COLUMNS,
    KINDS,
    MISSED,
    Subject,
    caught_by,
    family_of_column,
    make_tiny_subject,
    to_markdown,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.qconvert.planted", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: tiny random models with windows")
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--kinds", nargs="*", default=[], help="parts of names of kinds (default: all)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.kinds or any(part in kind for part in arguments.kinds)]
    results: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        given = arguments.checkpoint
        subjects = {} if given is None else {"given": Subject.of(given)}
        for column in arguments.columns:
            family = family_of_column(column) if given is None else "given"
            if family not in subjects:
                subjects[family] = make_tiny_subject(work / family, family)
            subject = subjects[family]
            made = subject.passing_export(column, work / column.replace(" ", "-"))
            for kind in kinds:
                started = time.perf_counter()
                caught = results[kind][column] = caught_by(subject, made, kind, work / "planted")
                seconds = time.perf_counter() - started
                print(f"{seconds:6.1f} s  {column}: {kind}: {caught}", file=sys.stderr, flush=True)
    print(to_markdown(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))
    outcomes = [caught for found in results.values() for caught in found.values()]
    tried = [caught for caught in outcomes if caught != ABSENT]
    missed = [caught for caught in tried if caught.startswith(MISSED)]
    print(f"{len(kinds)} kinds, {len(tried)} planted, {len(missed)} missed", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
