"""Many prompts from a file: answered with one engine that is kept full, and written, also after a kill."""
