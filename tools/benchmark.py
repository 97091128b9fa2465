"""Launcher of ``semtok benchmark``."""

import sys

from semtok.commands.cli import launch

sys.exit(launch("benchmark"))
