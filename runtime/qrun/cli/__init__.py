"""The ``qrun`` command."""
