"""Run in our own environment by quality.py: a text's token ids, and two files of logits compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 1024
ROWS = 64


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values


def compare(
    reference: NDArray[np.float32], logits: NDArray[np.float32], tokens: list[int]
) -> dict[str, float]:
    """Mean KL in nats, top-1 agreement, and perplexity of the text; both logits ``[tokens, vocab]``.

    Some engines pad the vocabulary; what exceeds the reference's is left out.

    Raises:
        ValueError: another number of positions, or logits that are not finite.
    """
    if len(logits) != len(reference):
        raise ValueError(f"{len(logits)} positions where the reference has {len(reference)}")
    kl, agree, nll, reference_nll = [], [], [], []
    for start in range(0, len(reference), ROWS):
        true = log_softmax(reference[start : start + ROWS])
        found = log_softmax(logits[start : start + ROWS, : reference.shape[1]])
        if not np.isfinite(found).all():
            raise ValueError(f"logits that are not finite at position {start} or soon after")
        kl += (np.exp(true) * (true - found)).sum(-1).tolist()
        agree += (true.argmax(-1) == found.argmax(-1)).tolist()
        for row, token in enumerate(tokens[start + 1 : start + 1 + len(true)]):
            nll.append(-found[row, token])
            reference_nll.append(-true[row, token])
    return {
        "positions": len(kl),
        "mean_kl": float(np.mean(kl)),
        "top1": float(np.mean(agree)),
        "perplexity": float(np.exp(np.mean(nll))),
        "reference_perplexity": float(np.exp(np.mean(reference_nll))),
    }


def main() -> None:
    verb, *files = sys.argv[1:]
    paths = [Path(file) for file in files]
    if verb == "tokens":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(paths[0] / "tokenizer.json"))
        ids = tokenizer.encode(paths[1].read_text(encoding="utf-8"), add_special_tokens=False).ids
        paths[2].write_text(json.dumps(ids[:MAX_TOKENS]))
        return
    reference, logits = (np.load(path, mmap_mode="r") for path in paths[:2])
    paths[3].write_text(json.dumps(compare(reference, logits, json.loads(paths[2].read_text()))))


if __name__ == "__main__":
    main()
