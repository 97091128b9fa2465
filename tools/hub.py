"""Launcher of ``semtok hub``."""

import sys

from semtok.commands.cli import launch

sys.exit(launch("hub"))
