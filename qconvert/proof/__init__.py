"""The proof that comes with an export: it reads what was written, and owes nothing to whoever wrote it."""
