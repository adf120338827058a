"""Load on servers: how much they answer, and how long clients wait."""
