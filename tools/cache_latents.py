"""Launcher of ``semtok cache_latents``."""

from semtok_cli import end_process, launched

if __name__ == "__main__":
    end_process(launched("cache_latents"))
