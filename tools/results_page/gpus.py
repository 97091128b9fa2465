"""What pages show of ``benchmark gpu``."""

from collections.abc import Sequence
from pathlib import Path

from results_page.tables import markdown
from semtok.errors import UserError
from semtok.storage import read_json

_HEADER = ("part", "", "what was found", "seconds")


def gpus(files: Sequence[Path]) -> str:
    """A table for each GPU that was measured, and a line that says which; a line that none was.

    Args:
        files: as ``benchmark gpu`` wrote them.

    Raises:
        UserError: one of a rehearsal, which tells nothing of a GPU.
    """
    if not files:
        return "Nothing was measured on a GPU yet."
    return "\n\n".join(map(_gpu, files))


def _gpu(file: Path) -> str:
    figures = read_json(file)
    if figures["is_rehearsal"]:
        raise UserError(f"{file}: is of a rehearsal, not of a GPU; take it out")
    rows = [
        [
            part["name"],
            part["state"],
            # What stands between two bars is one cell.
            part["found"].replace("|", "\\|"),
            f"{part['seconds']:.0f}",
        ]
        for part in figures["parts"]
        if part["state"] != "left out"
    ]
    left_out = [part["name"] for part in figures["parts"] if part["state"] == "left out"]
    line = f"{figures['device']}, torch {figures['torch']}, {figures['date']}"
    line += f"; left out, as the time was over: {', '.join(left_out)}" if left_out else ""
    return f"{line}:\n\n{markdown(_HEADER, rows)}"
