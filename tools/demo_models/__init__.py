"""How the embedded teacher and the embedded image VAE, ``demo`` both, are made."""

from importlib.resources import files
from pathlib import Path

ASSETS = Path(str(files("semtok") / "assets"))
