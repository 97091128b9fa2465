"""Kills commands at random moments and compares what they end with: see ``python tools/soak.py --help``."""

import sys

from semtok.commands.cli import run
from soaking.command import main

if __name__ == "__main__":
    sys.exit(run(main))
