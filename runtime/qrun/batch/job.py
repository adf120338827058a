"""What a job is: the input, what is asked of it, and the model. A restart must be the same job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrun.errors import QrunError
from qrun.folder.manifest import Manifest

# Text of a model folder that decides what is asked of the model, and that people may edit.
_TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Job:
    """A job, told so that two of them can be compared.

    Attributes:
        facts: by name, JSON values: the input, the model, and each option that changes an answer.
    """

    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """16 hexadecimal digits: the same for the same job."""
        text = json.dumps(self.facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_same(self, earlier: Mapping[str, Any]) -> bool:
        """Whether another job's facts are this one's."""
        return not self._differing(earlier)

    def check_same(self, earlier: Mapping[str, Any], folder: Path) -> None:
        """Refuse to go on with another job's answers.

        Args:
            earlier: the facts of the job that was begun.
            folder: where its answers lie.

        Raises:
            QrunError: names what differs.
        """
        other = self._differing(earlier)
        if other:
            raise QrunError(
                f"answers of another job are kept here: it had another {', '.join(other)}",
                where=folder,
                hint="give the same command as before, another --output, or --force to start over",
            )

    def _differing(self, earlier: Mapping[str, Any]) -> list[str]:
        ours = json.loads(json.dumps(self.facts, default=str))
        names = dict.fromkeys((*ours, *earlier))
        return [name for name in names if ours.get(name) != earlier.get(name)]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def model_facts(manifest: Manifest) -> dict[str, Any]:
    """What tells a model from another: the hashes that its manifest has, and those of the text beside it."""
    raw = hashlib.sha256(json.dumps(manifest.raw, sort_keys=True, default=str).encode()).hexdigest()
    texts = {name: digest(manifest.folder / name) for name in _TEXTS if (manifest.folder / name).is_file()}
    return {"name": manifest.name, "manifest": raw, **texts}
