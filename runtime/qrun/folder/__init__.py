"""What a model folder says of itself."""
