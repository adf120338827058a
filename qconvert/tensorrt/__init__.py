"""From a verified graph to a TensorRT plan."""
