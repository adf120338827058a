"""If these fail, an answer that was to fit a schema may not.

A selection of the JSON-Schema-Test-Suite (MIT, its authors'; from the source distribution of jsonschema
4.26). ``QCONVERT_SCHEMA_SUITE`` names the suite's folder ``tests``: then all of it is run, every draft
(``make test-schemas``).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from qrun.errors import QrunError
from tests.fakes import fake_model, repeating
from tests.qrun.writing import faults

DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
SELECTION = Path(__file__).parent / "data" / "json_schema_suite.json"
WHOLE = os.environ.get("QCONVERT_SCHEMA_SUITE")
# Python's re, with which jsonschema judges, has other classes than JavaScript's expressions.
NOT_JUDGED = ("ecmascript-regex.json",)


def groups(draft: str) -> list[dict]:
    if WHOLE is None:
        return json.loads(SELECTION.read_text())
    files = [path for path in sorted((Path(WHOLE) / draft).rglob("*.json")) if path.name not in NOT_JUDGED]
    return [group for path in files for group in json.loads(path.read_text())]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("draft", DRAFTS if WHOLE else ["draft2020-12"])
def test_every_schema_is_enforced_or_refused(tokenizer, draft):
    """Enforced: no case that the suite calls invalid is possible, and every answer written at random fits."""
    model, counts, wrong = fake_model(tokenizer, repeating(tokenizer, "x")), Counter(), []
    for group in groups(draft):
        schema = group["schema"]
        if isinstance(schema, dict) and "$schema" not in schema:
            schema = {"$schema": DRAFTS[draft], **schema}
        try:
            constraint = model.constraint(schema=schema)
        except QrunError as error:
            counts["refused"] += "cannot be enforced" in error.what
            continue
        assert constraint is not None
        found = list(faults(schema, constraint, tokenizer, group["tests"], answers=20 if WHOLE else 4))
        counts["enforced"] += 1
        counts["answers"] += found.count("")
        wrong += [f"{group['description']}: {schema}: {each}" for each in found if each]
        assert found.count("") or not group["tests"], f"no answer to {schema} found its end"
    print(draft, dict(counts))
    assert wrong == []
    assert counts["refused"] + counts["enforced"] == len(groups(draft))
    assert counts["enforced"] > 50
    assert counts["answers"] > 2 * counts["enforced"]
