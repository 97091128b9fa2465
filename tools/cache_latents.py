"""Launcher of ``semtok cache_latents``."""

import sys

from semtok_cli import launched

if __name__ == "__main__":
    sys.exit(launched("cache_latents"))
