"""The proof that comes with an export: it reads what was written, by none of the code that wrote it."""
