"""Launcher of ``semtok recipes``."""

import sys

from semtok.commands.cli import launch

if __name__ == "__main__":
    sys.exit(launch("recipes"))
