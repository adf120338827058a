"""A model folder: written, and published by one rename."""
