"""qrun: runs what qconvert made. Needs numpy, tokenizers and ONNX Runtime; no torch, no transformers."""

__version__ = "0.1.0"
