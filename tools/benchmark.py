"""Times the library beside plain PyTorch: see ``python tools/benchmark.py --help``."""

import sys

from benchmarks.command import main
from semtok.commands.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
