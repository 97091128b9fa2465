"""Launcher of ``semtok sample``."""

import sys

from semtok.commands.cli import launch

sys.exit(launch("sample"))
