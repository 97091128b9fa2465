"""Trains several tokenizers, a transformer on each, and reports: see ``python tools/compare.py --help``."""

import sys

from comparison.command import main
from semtok.commands.cli import run

sys.exit(run(main))
