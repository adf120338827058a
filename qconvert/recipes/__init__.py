"""Which weight takes which format, and what an export will cost."""
