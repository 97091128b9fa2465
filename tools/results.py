"""Keeps results in docs/results/ and draws the pages from them: see ``python tools/results.py --help``."""

import sys

from results_page.command import main
from semtok.commands.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
