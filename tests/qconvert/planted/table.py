"""All kinds, the exports into which they are planted, and the table of what caught them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.checkpoint.load import Checkpoint, load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof.verify import failures_one_by_one
from qrun.errors import QrunError
from tests.qconvert.planted.content import CACHE, CONSTANTS, STORED
from tests.qconvert.planted.edits import DoesNotApplyError, Plant, in_graph
from tests.qconvert.planted.files import FILES
from tests.qconvert.planted.groups import GROUPS
from tests.qconvert.planted.heads import HEADS
from tests.qconvert.planted.operators import ATTRIBUTES, WIRING
from tests.qconvert.planted.prompts import PROMPTS
from tests.tiny import WIDE_RANGE, make_tiny_checkpoint

QUIET = Progress(quiet=True)
COLUMNS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int8, int8 cache": {"precision": "int8", "int8_kv_cache": True},
    "int4": {"precision": "int4"},
    "int4 rtn": {"precision": "int4", "recipe": "rtn"},
    "int4 gptq": {"precision": "int4", "recipe": "gptq"},
    "int4, prefill, int8 cache": {"precision": "int4", "prefill": True, "int8_kv_cache": True},
    "Qwen3 fp32": {"precision": "fp32"},
    "Qwen3 int8, prefill, int8 cache": {"precision": "int8", "prefill": True, "int8_kv_cache": True},
    "Qwen3 int4, prefill, int8 cache": {"precision": "int4", "prefill": True, "int8_kv_cache": True},
}
KINDS: dict[str, Plant] = {
    **{kind: in_graph(edit) for kind, edit in (ATTRIBUTES | WIRING | GROUPS).items()},
    **CONSTANTS,
    **STORED,
    **CACHE,
    **PROMPTS,
    **HEADS,
    **FILES,
}
MISSED = "MISSED"
ABSENT = "-"
# Large enough for logits in two steps; a head of its own, so that neither matrix stands for the other;
# enough query heads to a key/value head for attention by groups.
_TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "initializer_range": WIDE_RANGE,
}


@dataclass(frozen=True)
class Subject:
    """One checkpoint: its files, loaded."""

    checkpoint: Checkpoint
    reference: Reference

    @classmethod
    def of(cls, folder: Path) -> Subject:
        checkpoint = open_checkpoint(folder)
        return cls(checkpoint, Reference(load_model(checkpoint)))

    def export(self, column: str, output: Path) -> Path:
        options = ExportOptions(output=output, verify=False, **COLUMNS[column])
        return export(str(self.checkpoint.folder), options, QUIET).folder

    def passing_export(self, column: str, output: Path) -> Path:
        """An export that passes its proof: beside a failure of its own, any error would seem to be caught.

        Raises:
            AssertionError: the proof finds something, with nothing planted.
        """
        folder = self.export(column, output)
        found = list(self.failures(folder))
        assert not found, f"{column}, nothing planted: {found}"
        return folder

    def failures(self, folder: Path) -> Iterator[tuple[str, str]]:
        """What the proof finds, and by which check, one check after the other."""
        found = failures_one_by_one(folder, self.checkpoint, self.reference, QUIET)
        try:
            for proof, failures in found:
                for failure in failures:
                    yield proof.name, f"{failure.where}: {failure.what}"
        except QrunError as error:  # an export with such an error is not published either
            yield "refused", error.what


def family_of_column(column: str) -> str:
    """The model_type of the checkpoint that a column exports."""
    return "qwen3" if column.startswith("Qwen3") else "qwen2"


def make_tiny_subject(folder: Path, family: str) -> Subject:
    """A tiny random model with windows."""
    return Subject.of(make_tiny_checkpoint(folder, family=family, sliding=True, **_TINY))


def planted(made: Path, kind: str, scratch: Path) -> Path:
    """A copy of a folder with one error in it.

    Raises:
        DoesNotApplyError: it has no place for it.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(made, scratch)
    KINDS[kind](scratch)
    return scratch


def caught_by(subject: Subject, made: Path, kind: str, scratch: Path) -> str:
    """The check that catches a planted error, ``MISSED``, or a dash where it has no place."""
    try:
        folder = planted(made, kind, scratch)
    except DoesNotApplyError:
        return ABSENT
    try:
        return next((check for check, _ in subject.failures(folder)), MISSED)
    except Exception as error:  # a traceback is no finding
        return f"{MISSED}: {type(error).__name__}: {error}"


def to_markdown(results: dict[str, dict[str, str]]) -> str:
    """Kinds by columns."""
    columns = list(next(iter(results.values())))
    lines = [f"| error | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [
        f"| {kind} | {' | '.join(found.get(column, '') for column in columns)} |"
        for kind, found in results.items()
    ]
    return "\n".join(lines) + "\n"
