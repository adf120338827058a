"""What exactness costs: mean KL of the sample, speed and bytes of a 0.5B, for each ``--quality`` and more.

    python -m benchmarks.frontier --sample CHECKPOINT --random CHECKPOINT --work FOLDER

The sample is exported with its proof. The random checkpoint has Qwen2.5's 0.5B shape (``make_random``); its
exports have none, since their values do not matter and their graphs are the sample's. Exports that are in
the work folder are taken as they are. Speed is measured in turn, a round of all points after the other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare.charts import Point, scatter
from benchmarks.compare.divergence import MAX_TOKENS, compare
from benchmarks.report import conditions
from qrun.evaluation.page import STYLE
from qrun.folder.manifest import read_manifest

REPOSITORY = Path(__file__).resolve().parent.parent
TEXTS = ("prose", "code", "german")
TWO_GRAPHS = ["--prefill", "int8", "--kv-cache", "int8"]
POINTS: dict[str, list[str]] = {
    "fast": ["--quality", "fast"],
    "fast, two graphs": ["--quality", "fast", *TWO_GRAPHS],
    "balanced": ["--quality", "balanced"],
    "balanced, two graphs": ["--quality", "balanced", *TWO_GRAPHS],
    "best": ["--quality", "best"],
    "rtn": ["--precision", "int4", "--recipe", "rtn"],
}


def exported(checkpoint: Path, options: list[str], folder: Path, *, proven: bool) -> Path:
    """The export of a checkpoint, made if it is not there."""
    if not folder.exists():
        command = [sys.executable, "-m", "qconvert.cli", "export", str(checkpoint), *options, "--quiet"]
        subprocess.run([*command, "--output", folder, *([] if proven else ["--no-verify"])], check=True)
    if proven and read_manifest(folder).verification != "passed":
        raise SystemExit(f"{folder} has not passed its proof: remove it")
    return folder


def token_ids(sample: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    words = (REPOSITORY / "benchmarks" / "texts" / f"{text}.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(sample / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
    return ids[:MAX_TOKENS]


def reference_logits(sample: Path, ids: list[int]) -> Any:
    """PyTorch's, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sample, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def divergences(sample: Path, folders: dict[str, Path], threads: int) -> dict[str, dict[str, float]]:
    """Mean KL on each text, by the name of a point."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks" / "peers"))
    engine = importlib.import_module("qconvert_engine").QrunModel

    found: dict[str, dict[str, float]] = {name: {} for name in folders}
    for text in TEXTS:
        ids = token_ids(sample, text)
        reference = reference_logits(sample, ids)
        for name, folder in folders.items():
            logits = engine(folder, "", threads).logits(ids)
            found[name][text] = round(compare(reference, logits, ids)["mean_kl"], 4)
    return found


def speeds(folder: Path, threads: int) -> tuple[float, float]:
    """Tokens a second of a prompt of 512, and of 64 new ones behind it."""
    command = [sys.executable, "-m", "qrun.cli", "bench", "--engine", str(folder), "--json", "-r", "1"]
    done = subprocess.run(
        [*command, "-p", "512", "-n", "64", "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    (found,) = json.loads(done.stdout)["results"]
    return found["prefill_tokens_per_second"], found["decode_tokens_per_second"]


def mean_of(kl: dict[str, float]) -> float:
    """Over the texts."""
    return sum(kl.values()) / len(kl)


def drawing(points: dict[str, Any]) -> str:
    """The chart as a file of its own: mean KL against decode speed, with megabytes in the labels."""
    marks = [
        Point(
            f"{name.replace(', two graphs', '*')}, {point['megabytes']:.0f} MB",
            median(point["decode"]),
            mean_of(point["kl"]),
            ours=True,
        )
        for name, point in points.items()
    ]
    figure = scatter(
        "What exactness costs", marks, "tokens/s, 0.5B, decoding (* two graphs)", "mean KL, 135M sample"
    )
    start, stop = figure.index("<svg"), figure.index("</svg>")
    head, body = figure[start:stop].split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{body}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sample", type=Path, required=True, help="what `qconvert sample` makes")
    parser.add_argument("--random", type=Path, required=True, help="what benchmarks.make_random makes")
    parser.add_argument("--work", type=Path, required=True, help="for exports")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks" / "results" / "frontier.json")
    parser.add_argument("--chart", type=Path, default=REPOSITORY / "docs" / "images" / "frontier.svg")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    def folders(checkpoint: Path, kind: str) -> dict[str, Path]:
        found = {}
        for name, options in POINTS.items():
            folder = arguments.work / f"{kind}-{name.replace(',', '').replace(' ', '-')}"
            found[name] = exported(checkpoint, options, folder, proven=kind == "sample")
        return found

    kl = divergences(arguments.sample, folders(arguments.sample, "sample"), arguments.threads)
    timed = folders(arguments.random, "random")
    rounds = [
        {name: speeds(folder, arguments.threads) for name, folder in timed.items()}
        for _ in range(arguments.rounds)
    ]
    points: dict[str, Any] = {
        name: {
            "options": " ".join(POINTS[name]),
            "kl": kl[name],
            "megabytes": sum(file.stat().st_size for file in folder.glob("*.onnx*")) / 1e6,
            "prompt": [each[name][0] for each in rounds],
            "decode": [each[name][1] for each in rounds],
        }
        for name, folder in timed.items()
    }
    facts = {"conditions": conditions({"ours": sys.executable}), "points": points}
    arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    arguments.chart.write_text(drawing(points))
    print("| | mean KL, sample | MB, 0.5B | prompt tokens/s | decode tokens/s |\n|---|---|---|---|---|")
    for name, point in points.items():
        print(
            f"| {name} | {mean_of(point['kl']):.3f} | {point['megabytes']:.0f} "
            f"| {median(point['prompt']):.0f} | {median(point['decode']):.1f} |"
        )


if __name__ == "__main__":
    main()
