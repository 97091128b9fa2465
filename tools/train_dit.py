"""Launcher of ``semtok train_dit``."""

import sys

from semtok_cli import launched

if __name__ == "__main__":
    sys.exit(launched("train_dit"))
