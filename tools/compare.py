"""Launcher of ``semtok compare``."""

import sys

from semtok.commands.cli import launch

sys.exit(launch("compare"))
