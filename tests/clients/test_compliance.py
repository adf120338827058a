"""llm-comply, which compares an API's answers with its published schema."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("llm_comply") is None, reason="needs llm-comply: run `make test-clients`"
)
# The models here read text only, and do not think aloud.
NOT_OURS = {"image-input", "chat-image-input", "anth-image-input"}
# /v1/responses/compact does not exist here: the client warns of that and passes.


@pytest.mark.parametrize(("api", "passing"), [("openai-chat", 7), ("open-responses", 11), ("anthropic", 7)])
def test_an_api_complies(address, api, passing):
    command = [sys.executable, "-c", "from llm_comply.cli import main; main()"]
    asked = ["-u", f"{address}/v1", "-m", "m", "-k", "-", "--format", api, "--json"]
    printed = subprocess.run([*command, *asked], capture_output=True, text=True, check=False).stdout
    results = json.loads(printed[printed.index("{") :])["results"]
    failed = {each["id"]: each.get("errors") for each in results if each["status"] == "failed"}
    assert set(failed) <= NOT_OURS, failed
    assert sum(each["status"] == "passed" for each in results) == passing
