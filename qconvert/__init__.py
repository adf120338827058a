"""qconvert: from a Qwen2 checkpoint to a verified ONNX model folder."""

from qrun import __version__

__all__ = ["__version__"]
