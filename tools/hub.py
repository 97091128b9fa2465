"""Launcher of ``semtok hub``."""

from semtok_cli import end_process, launched

if __name__ == "__main__":
    end_process(launched("hub"))
