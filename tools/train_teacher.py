"""Trains the embedded teacher again: see ``python tools/train_teacher.py --help``."""

import sys

from demo_models.train_teacher import main
from semtok.commands.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
