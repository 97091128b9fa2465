"""Trains the embedded image VAE again: see ``python tools/train_demo_vae.py --help``."""

import sys

from demo_models.train_vae import main
from semtok.commands.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
