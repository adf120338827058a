"""What a checkpoint is, and the view of it."""
