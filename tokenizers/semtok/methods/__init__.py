"""The methods of this library. Importing this package registers them."""

from semtok.methods import redi, reglue, semvae, send_vae, va_vae, vae

__all__ = ["redi", "reglue", "semvae", "send_vae", "va_vae", "vae"]
