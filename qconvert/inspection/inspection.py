"""What a checkpoint is, whether it is whole, and what running it will cost; no weight is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qconvert.calibration.text import reads_text
from qconvert.checkpoint.config import load_config
from qconvert.checkpoint.files import read_weight_files
from qconvert.checkpoint.fit import Misfit, find_misfit
from qconvert.checkpoint.gguf.marker import told_of_the_file
from qconvert.checkpoint.hub import as_folder
from qconvert.checkpoint.load import FLOATS, FileState, checkpoint_name, gguf_tensors
from qconvert.checkpoint.quantised.scheme import find_quantised, find_scheme
from qconvert.checkpoint.text_files import text_file_states
from qconvert.errors import QconvertError
from qconvert.formats.recipe import Kept
from qconvert.inspection.facts import Fact, find_facts
from qconvert.inspection.quantisation import quantisation_facts
from qconvert.models.families import spec_of
from qconvert.models.recorder import expected_tensors
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.choose import RECIPES, Wishes, choose
from qconvert.recipes.forecast import kv_bytes_per_token, parameter_count
from qconvert.recipes.kept import keepable
from qconvert.targets import DEFAULT_TARGET, TARGETS, Target
from qrun.errors import QrunError

_KV_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


@dataclass(frozen=True)
class Inspection:
    """Everything ``qconvert inspect`` tells.

    ``weight_bytes`` is keyed by precision, with the options that change it, and holds the bytes of an
    export's data files, None where it would be refused; ``kv_bytes_per_token`` is keyed by precision of the
    cache; ``context_length`` is in tokens. ``problems`` is empty for a whole checkpoint, and
    ``hints`` say what to do about them.
    """

    name: str
    folder: str
    facts: tuple[Fact, ...]
    parameters: int
    weight_bytes: dict[str, int | None]
    context_length: int
    kv_bytes_per_token: dict[str, int]
    files: tuple[FileState, ...]
    problems: tuple[str, ...]
    hints: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every needed file is whole and the tensors fit the configuration."""
        return not self.problems

    @property
    def kv_bytes_full_context(self) -> dict[str, int]:
        return {name: size * self.context_length for name, size in self.kv_bytes_per_token.items()}

    def to_json(self) -> dict[str, Any]:
        """One JSON object; facts are keyed by section and key."""
        sections: dict[str, dict[str, Any]] = {}
        for fact in self.facts:
            entry = {"value": fact.value, "meaning": fact.meaning}
            sections.setdefault(fact.section, {})[fact.key] = entry
        return {
            "name": self.name,
            "folder": self.folder,
            "whole": self.whole,
            "problems": list(self.problems),
            "hints": list(self.hints),
            "facts": sections,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "context_length": self.context_length,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_full_context": self.kv_bytes_full_context,
            "files": [asdict(state) for state in self.files],
        }


def describe(folder: Path) -> Inspection:
    """Inspects a checkpoint whose configuration is readable; its weights may be absent or broken.

    Raises:
        QconvertError: no folder, no or a malformed config.json, or a model that an export does not cover.
    """
    folder = as_folder(folder)
    with told_of_the_file(folder):
        return _describe(folder)


def _describe(folder: Path) -> Inspection:
    config = load_config(folder)
    spec = spec_of(config)
    weights = read_weight_files(folder)
    try:
        readable = reads_text(folder, spec.vocab_size)
    except QrunError:  # a broken file, which is named below with the others
        readable = False
    files = (*text_file_states(folder), *weights.states)
    problems = [state.problem for state in files if state.harmful]
    hints = [state.hint for state in files if state.harmful and state.hint]
    scheme, tensors, computed = find_scheme(folder), weights.tensors, {}
    if all(state.status == "whole" for state in weights.states):
        try:
            if scheme is not None:
                quantised = find_quantised(folder, scheme, tensors, expected_tensors(spec))
                tensors, computed = quantised.all, quantised.computed
            elif (gguf := gguf_tensors(folder)) is not None:
                computed = {
                    name: each for name, each in gguf.computed.items() if each.stored_as not in FLOATS
                }
            misfit = find_misfit(config, tensors)
        except QconvertError as error:  # a quantised matrix that is not what it should be
            misfit = Misfit((error.what,), error.hint or "")
        if misfit is not None:
            problems += misfit.problems
            hints.append(misfit.hint)
    facts = list(find_facts(folder, config, spec, weights.tensors, files))
    if scheme is not None or computed:
        facts += quantisation_facts(scheme, computed)
    held = {name: each.kept for name, each in computed.items() if each.kept is not None}
    return Inspection(
        name=checkpoint_name(folder),
        folder=str(folder),
        facts=tuple(facts),
        parameters=parameter_count(spec),
        weight_bytes={
            name: _weight_bytes(spec, offer, readable, held, computed)
            for name, offer in (*_kept_offers(held), *_offers())
        },
        context_length=spec.context_length,
        kv_bytes_per_token={name: kv_bytes_per_token(spec, dtype) for name, dtype in _KV_DTYPES.items()},
        files=files,
        problems=tuple(problems),
        hints=tuple(dict.fromkeys(hints)),
    )


def _kept_offers(held: Mapping[str, Kept]) -> Iterator[tuple[str, tuple[Target, Wishes]]]:
    """Exports of the codes that a checkpoint holds."""
    for target in TARGETS.values():
        if keepable(target.capabilities, held):
            yield f"{'' if target.name == DEFAULT_TARGET else f'{target.name} '}kept", (target, Wishes())


def _offers() -> Iterator[tuple[str, tuple[Target, Wishes]]]:
    """Exports whose weights are forecast, and the names under which they are shown."""
    for target in TARGETS.values():
        prefix = "" if target.name == DEFAULT_TARGET else f"{target.name} "
        for precision in target.capabilities.precisions:
            yield f"{prefix}{precision}", (target, Wishes(precision))
    target = TARGETS[DEFAULT_TARGET]
    for recipe in RECIPES[1:]:
        yield f"int4 --recipe {recipe}", (target, Wishes("int4", recipe=recipe))
    yield "int4 --prefill int8", (target, Wishes("int4", prefill=True))


def _weight_bytes(
    spec: DecoderSpec,
    offer: tuple[Target, Wishes],
    readable: bool,
    held: Mapping[str, Kept],
    quantised: Collection[str],
) -> int | None:
    from qconvert.lowering.forecast import data_bytes

    target, wishes = offer
    try:
        spec = target.fit(spec, None)
        kept = held if wishes.precision is None else {}
        choice = choose(wishes, target.capabilities, spec, kept, reads_text=readable, coarse=quantised)
    except QconvertError:
        return None
    return sum(data_bytes(target.lower, spec, choice.recipe).values())
