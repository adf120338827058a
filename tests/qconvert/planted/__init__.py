"""Errors that are planted into finished exports, one kind a time: which check of the proof catches each.

``python -m tests.qconvert.planted`` prints the table that docs/planted.md shows.
"""
