"""The decoder, described once, in the checkpoint's own names."""
