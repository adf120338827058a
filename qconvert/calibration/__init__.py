"""What a calibration text tells about a model: smoothing, scales of a KV cache, rounding by GPTQ."""
