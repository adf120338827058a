"""The decoder, told once, in the checkpoint's own names."""
