"""What is learnt of a model from a calibration text: smoothing, scales of a KV cache, AWQ, GPTQ."""
