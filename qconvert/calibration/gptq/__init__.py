"""Weights rounded on purpose (GPTQ): the walk through the decoder, the arithmetic, the results on disk."""
