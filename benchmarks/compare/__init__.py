"""``python -m benchmarks.compare``: our exports beside other engines, measured in turn, and a report."""
