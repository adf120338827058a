"""The prompts on which qrun, optimum and onnxruntime-genai must agree, and what qrun makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qrun.text.tokenizer import Tokenizer

NEW_TOKENS = 96


class Case(NamedTuple):
    """A prompt for the sample model; ``ends`` where its answer ends by itself before NEW_TOKENS."""

    name: str
    text: str
    ends: bool = False


class Exported(NamedTuple):
    """An exported sample, and qrun's prompt and greedy answer for each case by its name."""

    folder: Path
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]
    prompts: dict[str, list[int]]
    answers: dict[str, list[int]]


def chat(question: str) -> str:
    """The sample's chat template, written out: what it renders is another test's matter."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n"


# "long" is longer than what qrun prefills at once; the others are fed in one piece by every program.
LONG = " ".join(
    f"On day {day} the keeper climbed the stairs, lit the lamp and wrote it down." for day in range(1, 33)
)
CASES = (
    Case("story", chat("Tell me a story about an old lighthouse keeper and a lost ship.")),
    Case("list", chat("Explain step by step how bread is made.")),
    Case("code", "def fibonacci(n):\n    "),
    Case("long", chat(f"{LONG}\nContinue this story: what happened on the days after that?")),
    Case("end", chat("Tell me the capital of France."), ends=True),
)
