"""The folder opened as a user opens it, before it is published: a published folder always answers."""

from __future__ import annotations

from qconvert.proof.evidence import Evidence
from qconvert.proof.report import Failure
from qrun.errors import QrunError
from qrun.model import Model

_CONVERSATION = ({"role": "user", "content": "Hello!"},)


def prove_opening(seen: Evidence) -> list[Failure]:
    """Session, tokenizer, chat template and sampling defaults, and one token as an answer."""
    try:
        model = Model.open(seen.manifest.folder)
        prompt = "Hello!" if model.template is None else model.template.render(_CONVERSATION)
        model.resolve({})
        ids = model.tokenizer.encode(prompt, add_special_tokens=model.template is None)
        context = seen.manifest.model.context_length
        for _ in model.generate(ids[: max(1, context - 1)], max_tokens=1):
            pass
    except QrunError as error:
        where = "" if error.where is None else f" ({error.where})"
        return [Failure("opening the folder as a user does", f"{error.what}{where}")]
    return []
