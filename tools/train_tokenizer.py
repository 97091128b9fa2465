"""Launcher of ``semtok train_tokenizer``."""

import sys

from semtok.commands.cli import launch

if __name__ == "__main__":
    sys.exit(launch("train_tokenizer"))
