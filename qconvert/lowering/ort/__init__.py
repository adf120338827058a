"""The decoder in ONNX Runtime's operators."""
