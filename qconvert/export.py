"""The whole flow on one screen: load, describe, lower, quantise, save, verify, publish."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.calibration.awq import helpers_worth
from qconvert.calibration.calibrate import calibrate
from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.calibration.helper import helpers
from qconvert.calibration.kv_scales import KVScales
from qconvert.calibration.observer import TOKENS
from qconvert.calibration.text import CalibrationText, calibration_text, reads_text
from qconvert.checkpoint.hashing import hashed_meanwhile
from qconvert.checkpoint.hub import Hub
from qconvert.checkpoint.load import (
    Checkpoint,
    load_model,
    open_checkpoint,
    resolve_source,
    stored_dtypes,
    with_adapters,
)
from qconvert.errors import QconvertError
from qconvert.folder.artifact import ModelFolder, new_model_folder
from qconvert.folder.companions import write_companions
from qconvert.formats.folding import NO_FOLDING, Folding
from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import ChannelFormat, Recipe
from qconvert.models.families import family_of, rope_tables, spec_of
from qconvert.models.spec import DecoderSpec
from qconvert.parallel import piece_workers
from qconvert.progress import Progress
from qconvert.recipes.choose import Wishes, choose
from qconvert.recipes.forecast import parameter_count
from qconvert.recipes.kept import about_codes
from qconvert.targets import DEFAULT_TARGET, Target, target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qconvert.proof.verify import Report

_LIBRARIES = ("qconvert", "torch", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-gpu")


_NO_TEXT = (
    "the checkpoint has no tokenizer for its vocabulary, so its weights are rounded to nearest (rtn): with "
    "one, int4 is rounded on a text, with half of the error"
)


@dataclass(frozen=True)
class ExportOptions(Wishes):
    """What a user may choose; see ``qconvert export --help``."""

    target: str = DEFAULT_TARGET
    max_length: int | None = None
    output: Path | None = None
    force: bool = False
    verify: bool = True
    keep_failed: bool = False
    hub: Hub = "huggingface"
    revision: str | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A published model folder, and the proof that came with it (None if it was not asked for)."""

    folder: Path
    report: Report | None


def export(source: str, options: ExportOptions, progress: Progress) -> Exported:
    """Convert a checkpoint into a verified model folder.

    Raises:
        QconvertError: a bad checkpoint or option, no space, or an export that failed its verification.
    """
    from qconvert.lowering.forecast import data_bytes

    found = open_checkpoint(resolve_source(source, hub=options.hub, revision=options.revision))
    checkpoint = with_adapters(found, options.adapters)
    target = target_named(options.target)
    options = _packed_again(options, checkpoint, target)
    spec = target.fit(spec_of(checkpoint.config), options.max_length)
    readable = reads_text(checkpoint.folder, spec.vocab_size)
    choice = choose(
        options, target.capabilities, spec, checkpoint.held, reads_text=readable, coarse=checkpoint.stored_as
    )
    text, recipe = None, choice.recipe

    def read_text(source: str | None, tokens: int) -> CalibrationText:
        return calibration_text(source, checkpoint.folder, spec.vocab_size, spec.context_length, tokens)

    progress.note(*checkpoint.notes, *about_codes(checkpoint.stored_as, recipe))
    progress.note(*([_NO_TEXT] if choice.name == "int4-rtn" and options.recipe is None else []))
    if choice.calibrated:
        text = read_text(options.calibrate, choice.tokens)
        recipe = choice.on_text(text.facts)
    output = options.output or Path(f"{checkpoint.name}-{target.folder_name}-{choice.name}")
    needed = sum(data_bytes(target.lower, spec, recipe).values()) + (64 << 20)  # graph, tokenizer and reports

    with (
        new_model_folder(output, force=options.force, needed_bytes=needed) as folder,
        ExitStack() as leftovers,
    ):
        count = helpers_worth(parameter_count(spec)) if choice.method == "awq" else 0
        others = leftovers.enter_context(helpers(count))
        with hashed_meanwhile(checkpoint.weight_files) as hashes:
            with progress.task("loading the checkpoint"):
                model = load_model(checkpoint)
            rounded = None
            if text is not None:
                if choice.method != "gptq":
                    # Nothing of it is kept, before or after a failure, so it need not wait for the hashes.
                    rounded = RoundedWeights(folder.output, {}, recipe)
                    leftovers.callback(rounded.remove)
                else:
                    of_adapters = {
                        f"adapter {place}": f"{each}" for place, each in enumerate(checkpoint.adapters)
                    }
                    rounded = RoundedWeights(folder.output, {**hashes.result(), **of_adapters}, recipe)
            calibrated = calibrate(
                model,
                recipe,
                rounded=rounded,
                text=text,
                own_text=lambda: read_text(None, TOKENS),
                folder=folder.path,
                progress=progress,
                helpers=others,
            )
            with progress.task("writing the graph", parameter_count(spec)) as advance:
                write_graph(
                    model,
                    spec,
                    recipe,
                    target,
                    folder.path,
                    folding=calibrated.folding,
                    balance=calibrated.balance,
                    rounded=rounded,
                    kv_scales=calibrated.kv_scales,
                    advance=advance,
                    hashed=folder.note_hash,
                )
            write_companions(checkpoint, spec, folder.path, for_genai=target.read_by_genai)
            facts = describe(checkpoint, spec, recipe, target, hashes.result())
        with progress.task("hashing the files"):
            folder.write_manifest(facts)
        report = None
        if options.verify:
            report = prove(folder, facts, (checkpoint, model), options, progress)
        with progress.task("publishing the folder"):
            published = folder.publish()
        if rounded is not None:
            rounded.remove()
        return Exported(published, report)


def _packed_again(options: ExportOptions, checkpoint: Checkpoint, target: Target) -> ExportOptions:
    """Adapters were merged into codes: by default all of them become codes of as many bits again."""
    if options.precision is None and checkpoint.repacked in target.capabilities.precisions:
        return replace(options, precision=checkpoint.repacked)
    return options


def write_graph(
    model: PreTrainedModel,
    spec: DecoderSpec,
    recipe: Recipe,
    target: Target,
    folder: Path,
    *,
    folding: Folding,
    kv_scales: KVScales,
    advance: Any = None,
    rounded: Mapping[str, PackedWeight] | None = None,
    balance: Folding = NO_FOLDING,
    hashed: Callable[[Path, str], None] | None = None,
) -> None:
    """Lower the decoder and write the target's graphs and ``model.onnx.data``.

    ``folding`` is that of integer products, ``balance`` that of all others; ``hashed`` is told the SHA-256 of
    each data file.
    """
    import onnx_ir

    from qconvert.checkpoint.computed import KeptWeights
    from qconvert.checkpoint.weights import CheckpointWeights
    from qconvert.lowering.data_file import DATA_NAME, DataFile
    from qconvert.lowering.initializers import Initializers

    with DataFile(folder / DATA_NAME, hashed) as data, piece_workers() as workers:
        weights = CheckpointWeights(model, advance)
        kept = KeptWeights(model, recipe.kept)
        packed = kept if rounded is None else rounded
        initializers = Initializers(
            weights,
            data,
            workers,
            folding,
            packed,
            balance=balance,
            order_of=kept.order,
            rounded_integers=isinstance(recipe.linear, ChannelFormat),
        )
        for name, scale in kv_scales.items():
            initializers.constant(name, scale.numpy())
        graphs = target.lower(spec, recipe, initializers, rope_tables(model.config, spec.context_length))
    for name, graph in graphs.items():
        onnx_ir.save(graph, folder / name)


def prove(
    folder: ModelFolder,
    facts: dict[str, Any],
    source: tuple[Checkpoint, PreTrainedModel],
    options: ExportOptions,
    progress: Progress,
) -> Report:
    """Verify the folder before it is published, and write the verdict into it.

    Raises:
        QconvertError: the verification failed; the folder is kept aside with ``--keep-failed``.
    """
    from qconvert.checkpoint.reference import Reference
    from qconvert.proof.report_view import write_report
    from qconvert.proof.verify import verify

    checkpoint, model = source
    report = verify(folder.path, checkpoint, Reference(model), progress)
    write_report(report, folder.path)
    folder.write_manifest({**facts, "verification": report.verdict()})
    if not report.passed:
        kept = None
        if options.keep_failed:
            kept = folder.put_aside()
        raise QconvertError(
            f"the export does not compute what PyTorch computes:\n{report.failures()}",
            where=kept,
            hint="nothing was published. "
            + ("The report is in the folder above." if kept else "See the files with --keep-failed.")
            + " If the checkpoint is good, this is a bug of qconvert: please report it.",
        )
    return report


def describe(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    recipe: Recipe,
    target: Target,
    source_hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest's facts (docs/model-folder.md), files and header apart."""
    return {
        "name": checkpoint.name,
        "target": target.name,
        "precision": recipe.precision,
        "recipe": recipe.to_json(),
        "created_by": {"python": platform.python_version(), **_versions()},
        "source": {
            "name": checkpoint.name,
            "dtype": ", ".join(stored_dtypes(checkpoint.tensors)),
            "files": [
                {"path": path.name, "size": path.stat().st_size, "sha256": source_hashes[path.name]}
                for path in checkpoint.weight_files
            ],
            **({"adapters": list(checkpoint.adapters)} if checkpoint.adapters else {}),
        },
        "model": {
            "architecture": family_of(checkpoint.config).architecture,
            "parameters": parameter_count(spec),
            "num_hidden_layers": spec.num_hidden_layers,
            "num_attention_heads": spec.num_attention_heads,
            "num_key_value_heads": spec.num_key_value_heads,
            "head_size": spec.head_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "vocab_size": spec.vocab_size,
            "context_length": spec.context_length,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "rope": dict(checkpoint.config.rope_parameters),
            "sliding_windows": list(spec.sliding_windows) if any(spec.sliding_windows) else None,
        },
        **target.facts(spec, recipe),
        "tokens": {"eos": checkpoint.ends.ids},
        "verification": {"status": "not verified"},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
