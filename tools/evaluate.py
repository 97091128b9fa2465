"""Launcher of ``semtok evaluate``."""

import sys

from semtok.commands.cli import launch

if __name__ == "__main__":
    sys.exit(launch("evaluate"))
