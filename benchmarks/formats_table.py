"""The sample model in every format that is read, exported and proven: the table of docs/quantised.md.

``make formats-table`` makes the environment and measures all rows, a minute or two each; --layers 4 takes the
first layers alone, and a quarter of the time. Rows that were measured before stay in the JSON file, so that
they can be made one at a time.
The files are made by the programs that define the formats: GPTQModel, AutoAWQ and compressed-tensors pack the
matrices (rounded to nearest, so that no calibration is needed), llama.cpp's llama-quantize makes GGUF files.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qconvert.checkpoint.hub import resolve_source
from qconvert.checkpoint.load import open_checkpoint
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof.report import Report
from qrun.folder.manifest import MANIFEST_NAME
from tests.formats import making
from tests.qconvert.ggufs import write_gguf
from tests.qconvert.quantising import order_of_inputs, rewrite
from tests.real_llama import make_real_llama

GROUP = 64  # divides the sample's 576 and 1,536 inputs
GPTQMODEL = "GPTQModel 7.7.0"  # its sources are imported, not installed
CASES = ("long", "chinese", "code")
Make = Callable[[Path, Path, "Tools"], Path]


@dataclass(frozen=True)
class Tools:
    """What is needed to make files, beside the libraries."""

    quantizer: Path | None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: the format.
        maker: who has written the file.
        make: makes it of the sample checkpoint, in a folder, and gives its path.
    """

    title: str
    maker: Callable[[], str]
    make: Make


def gptq(sample: Path, folder: Path, _: Tools, *, bits: int, symmetric: bool, ordered: bool) -> Path:
    def pack(base: str, weight: torch.Tensor) -> making.Packed:
        # Matrices that read the same features have one order, as GPTQ finds it.
        reader = re.sub(r"[qkv]_proj|gate_proj|up_proj", "", base)
        groups = order_of_inputs(sum(map(ord, reader)), weight.shape[1], GROUP) if ordered else None
        return making.of_gptqmodel(weight, bits, GROUP, symmetric=symmetric, groups=groups)

    config = making.gptq_config(bits, GROUP, symmetric=symmetric, ordered=ordered)
    return _packed(sample, folder, config, pack, torch.float16)


def awq(sample: Path, folder: Path, _: Tools) -> Path:
    def pack(_: str, weight: torch.Tensor) -> making.Packed:
        return making.of_autoawq(weight, GROUP)

    return _packed(sample, folder, making.awq_config(GROUP), pack, torch.float16)


def compressed(sample: Path, folder: Path, _: Tools, *, form: str, **settings: Any) -> Path:
    def pack(_: str, weight: torch.Tensor) -> making.Packed:
        return making.of_compressed_tensors(weight.bfloat16(), form, settings)

    return _packed(sample, folder, making.compressed_config(form, settings), pack, torch.bfloat16)


def gguf(sample: Path, folder: Path, tools: Tools, *, kind: str) -> Path:
    if tools.quantizer is None:
        raise SystemExit("GGUF rows need --llama-quantize PROGRAM, llama.cpp's own quantiser")
    floats, made = folder / "sample-f32.gguf", folder / f"sample-{kind}.gguf"
    write_gguf(make_real_llama(sample, folder / "llama"), floats, rule="smollm")
    command = [str(each) for each in (tools.quantizer, floats, made, kind, 2)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    floats.unlink()
    shutil.rmtree(folder / "llama")
    return made


def _packed(
    sample: Path,
    folder: Path,
    config: dict[str, Any],
    pack: Callable[[str, torch.Tensor], making.Packed],
    dtype: torch.dtype,
) -> Path:
    made = shutil.copytree(sample, folder / "checkpoint")

    def change(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{base}.{end}": tensor for end, tensor in pack(base, weight)[0].items()}

    def cast(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{base}.weight" if not base.endswith(".bias") else base: weight.to(dtype)}

    rewrite(made, None, cast, re.compile(r"(norm|embed_tokens)\.weight$|\.bias$"))
    return rewrite(made, config, change)


def first_layers(sample: Path, folder: Path, count: int) -> Path:
    """The sample without its later layers: it makes no sense any more, and is rounded as the whole is."""
    made = shutil.copytree(sample, folder)
    tensors = load_file(made / "model.safetensors")
    layer = re.compile(r"model\.layers\.(\d+)\.")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if (found := layer.match(name)) is None or int(found[1]) < count
    }
    save_file(kept, made / "model.safetensors", {"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    return made


def _version_of(package: str, title: str) -> Callable[[], str]:
    return lambda: f"{title} {version(package)}"


def _gptq(bits: int, *, symmetric: bool = True, ordered: bool = False) -> Row:
    of = "symmetric" if symmetric else "zero points"
    title = f"GPTQ, {bits} bits, {of}, groups of {GROUP}{', desc_act' if ordered else ''}"
    make = partial(gptq, bits=bits, symmetric=symmetric, ordered=ordered)
    return Row(title, lambda: GPTQMODEL, make)


def _compressed(title: str, form: str, **settings: Any) -> Row:
    maker = _version_of("compressed-tensors", "compressed-tensors")
    return Row(f"compressed-tensors, {title}", maker, partial(compressed, form=form, **settings))


def _grouped(bits: int, *, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "group", "group_size": GROUP, "symmetric": symmetric}


ROWS: dict[str, Row] = {
    "gptq-4": _gptq(4),
    "gptq-4-order": _gptq(4, ordered=True),
    "gptq-4-zeros-order": _gptq(4, symmetric=False, ordered=True),
    "gptq-8": _gptq(8),
    "awq": Row(f"AWQ, gemm, zero points, groups of {GROUP}", _version_of("autoawq", "AutoAWQ"), awq),
    "compressed-4": _compressed(
        f"packed, 4 bits, symmetric, groups of {GROUP}", "pack-quantized", **_grouped(4, symmetric=True)
    ),
    "compressed-4-zeros": _compressed(
        f"packed, 4 bits, zero points, groups of {GROUP}", "pack-quantized", **_grouped(4, symmetric=False)
    ),
    "compressed-8": _compressed(
        f"packed, 8 bits, symmetric, groups of {GROUP}", "pack-quantized", **_grouped(8, symmetric=True)
    ),
    "fp8": _compressed(
        "floats of 8 bits, a scale for each output",
        "float-quantized",
        num_bits=8,
        type="float",
        strategy="channel",
    ),
    **{
        f"gguf-{kind}": Row(f"GGUF, {kind}", lambda: "llama.cpp's llama-quantize", partial(gguf, kind=kind))
        for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q6_K")
    },
}


def measure(row: Row, sample: Path, scratch: Path, tools: Tools) -> dict[str, Any]:
    """Make the file, export it as it is, and tell what the export's own proof has found."""
    source = row.make(sample, scratch, tools)
    quantised = len(open_checkpoint(resolve_source(str(source))).stored_as)
    started = time.monotonic()
    done = export(str(source), ExportOptions(output=scratch / "export"), Progress(quiet=True))
    report = done.report
    assert report is not None
    recipe = json.loads((done.folder / MANIFEST_NAME).read_text())["recipe"]
    kept = sum(group["tensors"] for group in recipe["kept"])
    found = {
        "title": row.title,
        "maker": row.maker(),
        "quantised": quantised,
        "kept": kept,
        "precision": report.precision,
        "mean_kl": [_mean_kl(report, case) for case in CASES],
        "greedy": [report.greedy.checks["checkpoint"].agreed, report.greedy.checks["checkpoint"].steps],
        "data_bytes": sum(file.stat().st_size for file in done.folder.glob("*.data")),
        "source_bytes": _bytes(source),
        "passed": report.passed,
        "seconds": round(time.monotonic() - started, 1),
        "date": time.strftime("%Y-%m-%d"),
    }
    shutil.rmtree(done.folder)
    return found


def _mean_kl(report: Report, case: str) -> float:
    path = next(each for each in report.paths if each.case == case and each.path.startswith("whole"))
    return path.measures["checkpoint"].mean_kl


def _bytes(source: Path) -> int:
    files = [source] if source.is_file() else list(source.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def table(measured: dict[str, dict[str, Any]]) -> str:
    """All rows that were measured, in the order of ``ROWS``, as Markdown."""
    lines = [
        "| checkpoint | made by | matrices with their codes kept | mean KL: prose, Chinese, code | greedy | "
        "checkpoint, MB | model.onnx.data, MB | proof |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        if (row := measured.get(name)) is None:
            continue
        kept = f"{row['kept']} of {row['quantised']}"
        if not row["kept"]:
            kept += (
                f": rounded again to {row['precision']}" if row["precision"] != "fp32" else ": dequantised"
            )
        cells = (
            *(row["title"], row["maker"], kept, ", ".join(f"{kl:.2g}" for kl in row["mean_kl"])),
            "{} of {}".format(*row["greedy"]),
            *(f"{row[key] / 1e6:.1f}" for key in ("source_bytes", "data_bytes")),
            "PASSED" if row["passed"] else "FAILED",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.formats_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all if none is named: {', '.join(ROWS)}")
    parser.add_argument("--sample", type=Path, default=Path(".cache/tests/sample-model"))
    parser.add_argument("--llama-quantize", type=Path, metavar="PROGRAM", help="llama.cpp's, for GGUF rows")
    parser.add_argument("--layers", type=int, help="of the sample, the first ones; all of them by default")
    parser.add_argument("--missing", action="store_true", help="only rows that were not measured before")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/formats.json"))
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.rows if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    measured = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name in arguments.rows or ROWS:
        if arguments.missing and name in measured:
            continue
        if name.startswith("gguf-") and arguments.llama_quantize is None and not arguments.rows:
            continue  # said by the table, which keeps what was measured before
        with tempfile.TemporaryDirectory() as scratch:
            sample = arguments.sample
            if arguments.layers is not None:
                sample = first_layers(sample, Path(scratch) / "sample", arguments.layers)
            measured[name] = measure(ROWS[name], sample, Path(scratch), Tools(arguments.llama_quantize))
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
