"""Launcher of ``semtok cache_latents``."""

import sys

from semtok.commands.cli import launch

if __name__ == "__main__":
    sys.exit(launch("cache_latents"))
