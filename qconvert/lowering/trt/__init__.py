"""The decoder in TensorRT's operators, and in standard ones for its proof."""
