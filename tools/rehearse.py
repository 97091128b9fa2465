"""One real step of full-size recipes on a CPU: see ``python tools/rehearse.py --help``."""

import sys

from rehearsal.command import main
from semtok.commands.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
