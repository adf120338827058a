"""How far each engine's logits of the sample model are from PyTorch's in float32, text by text."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.compare.peers import PEERS, Contender
from benchmarks.compare.records import Result, StepFailedError
from benchmarks.compare.steps import QUALITY_SHAPE, REPOSITORY, Workshop, hash_text

FOLDER = REPOSITORY / "benchmarks" / "texts"
TEXTS = ("prose", "code", "german")
MEASURES = ("mean_kl", "top1", "perplexity", "reference_perplexity", "positions")


def reference_logits(workshop: Workshop, text: str) -> Path:
    """PyTorch's float32 logits, made once per text; needs our own environment, not transformers' peer."""
    tokens, logits = _files(workshop, text)
    if not logits.exists():
        model = workshop.model(QUALITY_SHAPE)
        tokenize = ["-m", "benchmarks.compare.divergence", "tokens", str(model), str(FOLDER / f"{text}.txt")]
        workshop.run_ours([*tokenize, str(tokens)], f"tokens-{text}.log")
        program = ["logits", str(model), "--variant", "fp32", "--tokens", str(tokens)]
        draft = logits.with_name(f"draft-{logits.name}")
        command = [str(PEERS["transformers"].program), *program, "--output", str(draft)]
        workshop.run_ours(command, f"reference-{text}.log")
        draft.replace(logits)
    return logits


def measure_quality(workshop: Workshop, contender: Contender, text: str) -> Result:
    """Mean KL divergence, top-1 agreement and perplexity over the text's positions."""
    key = {**workshop.conversion_key(contender, QUALITY_SHAPE), "text": text}
    key["text_hash"] = hash_text(FOLDER / f"{text}.txt")
    if contender.ours:
        key |= workshop.runtime_key(contender)

    def compare() -> Result:
        tokens, reference = _files(workshop, text)
        logits = workshop.folder / "logits" / f"{contender.peer.name}-{contender.variant}-{text}.npy"
        try:
            workshop.logits(contender, tokens, logits)
            answer = workshop.folder / "logits" / f"{logits.stem}.json"
            files = [str(path) for path in (reference, logits, tokens, answer)]
            workshop.run_ours(
                ["-m", "benchmarks.compare.divergence", "compare", *files], f"{logits.stem}.log"
            )
            found: Result = json.loads(answer.read_text())
        except FileNotFoundError as error:
            raise StepFailedError(f"{error.filename} was not written") from None
        finally:
            logits.unlink(missing_ok=True)
        return {"result": found}

    return workshop.records.once("quality", key, compare)


def _files(workshop: Workshop, text: str) -> tuple[Path, Path]:
    stem = f"reference-{text}-{hash_text(FOLDER / f'{text}.txt')}"
    return workshop.folder / "logits" / f"{stem}.tokens.json", workshop.folder / "logits" / f"{stem}.npy"
