"""Launcher of ``semtok train_tokenizer``."""

import sys

from semtok_cli import launched

if __name__ == "__main__":
    sys.exit(launched("train_tokenizer"))
