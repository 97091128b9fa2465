"""The methods of this library. Importing this package registers them."""

from semtok.methods import redi, reglue, repae, semvae, send_vae, vae

__all__ = ["redi", "reglue", "repae", "semvae", "send_vae", "vae"]
