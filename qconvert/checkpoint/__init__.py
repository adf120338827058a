"""A checkpoint: found, whole, loaded, and run in float32."""
