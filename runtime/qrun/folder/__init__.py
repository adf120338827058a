"""Reading and checking a model folder: its manifest, its files, its plan."""
