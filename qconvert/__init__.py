"""qconvert: from a Qwen2, Qwen3 or Llama checkpoint to a verified ONNX model folder."""

from qrun import __version__

__all__ = ["__version__"]
