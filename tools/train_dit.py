"""Launcher of ``semtok train_dit``."""

import sys

from semtok.commands.cli import launch

if __name__ == "__main__":
    sys.exit(launch("train_dit"))
