"""Launcher of ``semtok cache_latents``."""

import sys

from semtok.commands.cli import launch

sys.exit(launch("cache_latents"))
