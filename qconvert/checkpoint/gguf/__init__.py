"""GGUF files: one file, or several parts of one, that hold weights, configuration, tokenizer and template."""
