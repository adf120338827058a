"""Adapters (PEFT LoRA): read, held against the model, merged into its weights while these are read."""
