"""Checkpoints whose weights are quantised already: read field by field, dequantised, or kept as codes."""
