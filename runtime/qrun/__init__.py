"""qrun: runs what qconvert made. Needs ONNX Runtime, tokenizers and NumPy; no torch, no transformers.

    import qrun

    model = qrun.open("./Qwen2.5-1.5B-Instruct-onnx-int8")
    for event in model.chat().send("What is the capital of France?"):
        if isinstance(event, qrun.Piece):
            print(event.text, end="", flush=True)

Importing qrun is cheap: ONNX Runtime and the tokenizer are loaded by ``open``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.errors import QrunError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qrun.answer import Answer, Event, Piece
    from qrun.backends.opening import Opening
    from qrun.chat import Chat
    from qrun.decoding.generate import Prefilled
    from qrun.engine import Engine
    from qrun.model import Model
    from qrun.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Chat",
    "Engine",
    "Event",
    "Model",
    "Piece",
    "Prefilled",
    "QrunError",
    "SamplingParams",
    "open",
]

_HOMES = {
    "Answer": "qrun.answer",
    "Chat": "qrun.chat",
    "Engine": "qrun.engine",
    "Event": "qrun.answer",
    "Model": "qrun.model",
    "Piece": "qrun.answer",
    "Prefilled": "qrun.decoding.generate",
    "SamplingParams": "qrun.sampling.params",
}


def open(path: str | Path, **options: Unpack[Opening]) -> Model:
    """Open a model folder, or the .onnx inside one: ``Model.open`` under a shorter name."""
    from qrun.model import Model

    return Model.open(path, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qrun' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
