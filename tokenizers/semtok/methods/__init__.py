"""The methods of this library. Importing this package registers them."""

from semtok.methods import rae, redi, reglue, repae, semvae, send_vae, va_vae, vae

__all__ = ["rae", "redi", "reglue", "repae", "semvae", "send_vae", "va_vae", "vae"]
