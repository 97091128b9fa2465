"""Trains several tokenizers, a transformer on each, and reports: see ``python tools/compare.py --help``."""

import sys

from comparison.command import main
from semtok.commands.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
