"""Launcher of ``semtok convert``."""

import sys

from semtok_cli import launched

if __name__ == "__main__":
    sys.exit(launched("convert"))
