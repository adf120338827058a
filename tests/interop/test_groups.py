"""If these fail, other programs no longer read a graph that has two ways of attention.

They know nothing of its input ``attend_by_groups`` and get the default, where qrun asks for the other way.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from numpy.typing import NDArray
from optimum.onnxruntime import ORTModelForCausalLM

from qrun.backends.opening import open_session

FOLDER = Path(os.environ.get("QCONVERT_INTEROP", "")) / "groups" / "model"
# As many as let qrun go by groups, and one more token by itself; in genai's cache there is room for no other.
TOKENS = np.random.default_rng(5).integers(0, 256, (1, 561), dtype=np.int64)


@pytest.fixture(scope="module")
def own() -> NDArray[np.float32]:
    """qrun's logits after the last token, which goes by groups."""
    session = open_session(FOLDER, check_hashes=True)
    assert "attend_by_groups" in session.manifest.raw["graph"]["inputs"]
    cache = session.new_cache()
    session.forward(TOKENS[:, :-1], cache, "none")
    return session.forward(TOKENS[:, -1:], cache, "last")[0, 0].copy()


def test_optimum_gives_the_same_logits(own: NDArray[np.float32]) -> None:
    model = ORTModelForCausalLM.from_pretrained(FOLDER)
    ids = torch.tensor(TOKENS)
    before = model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]), use_cache=True)
    after = model(
        input_ids=ids[:, -1:],
        attention_mask=torch.ones_like(ids),
        past_key_values=before.past_key_values,
        use_cache=True,
    )
    assert np.abs(after.logits[0, -1].numpy() - own).max() < 1e-3


@pytest.mark.parametrize("shared", [True, False], ids=["in-place cache", "growing cache"])
def test_genai_gives_the_same_logits(own: NDArray[np.float32], shared: bool) -> None:
    model = og.Model(str(FOLDER))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=TOKENS.shape[1] + 1, past_present_share_buffer=shared)
    generator = og.Generator(model, params)
    for tokens in (TOKENS[:, :-1], TOKENS[:, -1:]):
        generator.append_tokens(tokens.astype(np.int32))
    logits = np.asarray(generator.get_logits()).reshape(-1, own.size)[-1]
    assert np.abs(logits - own).max() < 1e-3
