"""The sampler room: all that turns noise into latents, and RAE's decoder, which no other library has.

It imports torch, einops, timm, pydantic and itself, nothing else of this library, so that an exported pipeline carries
these files whole (``semtok.hub.export_pipeline``).
"""
