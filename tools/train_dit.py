"""Launcher of ``semtok train_dit``."""

import sys

from semtok.commands.cli import launch

sys.exit(launch("train_dit"))
