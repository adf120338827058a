"""What a model folder is worth on one's own data, and what another folder changes there."""
