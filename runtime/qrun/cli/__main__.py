"""``python -m qrun.cli`` is ``qrun``."""

from qrun.cli.main import main

main()
