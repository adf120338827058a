"""Time and memory of `qconvert export` beside onnxruntime-genai's builder, on the same checkpoint, in turn.

Both turn a checkpoint of a Qwen2.5 shape (random bf16 weights) into a 4-bit ONNX model for the CPU, without
verification. With --optimum also optimum-cli beside qconvert, both in fp32. With --own qconvert alone, in the
recipes that calibrate: these need a checkpoint with a tokenizer. Each program runs in a process
of its own; the programs take turns, so that a slow spell of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measured import Run, run_measured
from benchmarks.report import conditions, conditions_text, publish, spread, summary, table
from benchmarks.shapes import SHAPES

OWN = ("int4", "int4 --prefill int8 --kv-cache int8", "int8", "int4 --recipe gptq")
REPOSITORY = Path(__file__).resolve().parent.parent


def programs(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, list[str]]:
    """Command lines by program, without the output folder at their end."""
    export = [sys.executable, "-m", "qconvert.cli", "export", str(checkpoint), "--no-verify"]
    if arguments.own is not None:
        return {
            options: [*export, "--precision", *options.split(), "--output"] for options in arguments.options
        }
    # Rounded to nearest, as the other programs round.
    export += ["--precision", arguments.precision, "--recipe", "rtn", "--output"]
    if arguments.optimum:
        optimum = [arguments.optimum_python, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
        optimum += ["--model", str(checkpoint), "--task", "text-generation-with-past"]
        # Its own check of the result is left out, as qconvert's is.
        return {"qconvert": export, "optimum": [*optimum, "--no-post-process", "--dtype", "fp32"]}
    builder = [arguments.builder_python, "-m", "onnxruntime_genai.models.builder", "-m", "random"]
    builder += ["-i", str(checkpoint), "-p", arguments.precision, "-e", "cpu", "-o"]
    return {"qconvert": export, "onnxruntime-genai builder": builder}


def measure(
    commands: dict[str, list[str]], runs: int, work: Path
) -> tuple[dict[str, list[Run]], dict[str, int]]:
    """Runs of every program in turn, and the bytes each one wrote."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    written = {}
    for number in range(runs):
        for name, command in commands.items():
            output = work / name.replace(" ", "-")
            shutil.rmtree(output, ignore_errors=True)
            run = run_measured([*command, str(output)], work / "program.log", cwd=REPOSITORY)
            results[name].append(run)
            written[name] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
            shutil.rmtree(output)
            figures = f"{run.wall_seconds:.1f} s, {run.peak_bytes / 1e9:.2f} GB"
            print(f"run {number + 1} of {runs}, {name}: {figures}", file=sys.stderr)
    return results, written


def read_once(folder: Path) -> None:
    """Bring the checkpoint into the page cache, so that the first run is no colder than the others."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_cost", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="default: 1.5b, with --optimum 0.5b")
    parser.add_argument("--runs", type=int, default=3, help="of each program (default: 3)")
    parser.add_argument("--quick", action="store_true", help="tiny shape, one run: does it work at all?")
    parser.add_argument("--optimum", action="store_true", help="beside optimum-cli, fp32")
    parser.add_argument(
        "--own", type=Path, metavar="CHECKPOINT", help="qconvert's recipes on this checkpoint"
    )
    parser.add_argument(
        "--options", nargs="+", default=OWN, help="with --own: options of each export after --precision"
    )
    parser.add_argument(
        "--builder-python",
        default=sys.executable,
        help="an environment with onnxruntime-genai (default: this one)",
    )
    parser.add_argument(
        "--optimum-python", default=".venv-interop/bin/python", help="an environment with optimum-onnx"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".cache/benchmarks"),
        help="checkpoints are kept here (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result there too; - for stdout alone"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.runs = arguments.shape or "tiny", 1
    arguments.shape = arguments.shape or ("0.5b" if arguments.optimum else "1.5b")
    arguments.precision = "fp32" if arguments.optimum else "int4"
    if arguments.own is not None:
        arguments.own, arguments.shape, arguments.precision = (
            arguments.own.absolute(),
            arguments.own.name,
            "several",
        )
    return arguments


def main() -> None:
    arguments = parse()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.own
    if checkpoint is None:
        checkpoint = work / f"random-{arguments.shape}"
        # In a process of its own: see run_measured.
        make = [sys.executable, "-m", "benchmarks.make_random", arguments.shape, str(checkpoint)]
        run_measured(make, work / "make_random.log", cwd=REPOSITORY)
    read_once(checkpoint)
    commands = programs(arguments, checkpoint)
    facts = conditions({name: command[0] for name, command in commands.items()})
    with tempfile.TemporaryDirectory(dir=work) as folder:
        results, written = measure(commands, arguments.runs, Path(folder))

    rows = [
        [
            name,
            spread([run.wall_seconds for run in runs]),
            spread([run.cpu_seconds for run in runs]),
            spread([run.peak_bytes / 1e9 for run in runs], 2),
            f"{written[name] / 1e9:.2f}",
        ]
        for name, runs in results.items()
    ]
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    shape = arguments.shape
    source = shape if arguments.own else f"Qwen2.5-{shape.upper()} shape, random bf16 weights"
    of = f"{source} ({size / 1e9:.2f} GB), to {arguments.precision}"
    title = f"{of}; median (range) of {arguments.runs}, in turn."
    header = ["program", "seconds", "CPU seconds", "peak resident GB", "written GB"]
    text = f"{title}\n\n{table(header, rows)}\n\n{conditions_text(facts)}"
    result: dict[str, Any] = {
        "benchmark": "export_cost",
        "shape": arguments.shape,
        "precision": arguments.precision,
        "checkpoint_bytes": size,
        "commands": {
            name: " ".join(["python", *command[1:], "OUTPUT"]).replace(str(checkpoint), "CHECKPOINT")
            for name, command in commands.items()
        },
        "programs": {
            name: {
                "wall_seconds": summary([run.wall_seconds for run in runs]),
                "cpu_seconds": summary([run.cpu_seconds for run in runs]),
                "peak_bytes": summary([run.peak_bytes for run in runs]),
                "written_bytes": written[name],
                "runs": [asdict(run) for run in runs],
            }
            for name, runs in results.items()
        },
        **facts,
    }
    publish(text, result, arguments.json)


if __name__ == "__main__":
    main()
