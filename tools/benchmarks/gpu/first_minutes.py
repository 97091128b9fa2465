"""``benchmark gpu``: what only a GPU can tell, part by part, within the minutes that there are."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.processes import Workers
from benchmarks.gpu.worker import do_part
from semtok.commands.table import print_table
from semtok.errors import UserError
from semtok.storage import write_json

LONGEST = 100.0
"""Seconds after which a part is stopped."""
GRACE = 25.0
"""Seconds that a part under way has when the minutes are over."""
_LEAST_SHARE = 1 / 8

Do = Callable[[Part, float, float], dict[str, Any]]


def chosen(words: Sequence[str] | None) -> list[Part]:
    """The parts whose names hold any of these words; None: all.

    Raises:
        UserError: a word that is in no name.
    """
    for word in words or ():
        if not any(word in part.name for part in PARTS):
            names = ", ".join(part.name for part in PARTS)
            raise UserError(f"--only {word}: no part has this in its name; parts: {names}")
    return [part for part in PARTS if words is None or any(word in part.name for word in words)]


def first_minutes(
    parts: Sequence[Part], minutes: float, folder: Path, output: Path | None, *, tiny: bool
) -> dict[str, Any]:
    """Does the parts in their order and writes what was found after each.

    Args:
        minutes: after which no part begins.
        folder: for what the parts write.
        output: a file; None: nothing is written.
        tiny: rehearses: smallest sizes, all in this process.

    Returns:
        what is written.

    Raises:
        UserError: there is no GPU, and this is no rehearsal.
    """
    if not torch.cuda.is_available() and not tiny:
        raise UserError("gpu: there is no GPU here; --tiny rehearses all parts on a CPU")
    figures = _head(minutes, tiny)
    start = time.monotonic()
    end = start + 60 * minutes
    with nullcontext() if tiny else Workers() as workers:
        do = _here(folder, tiny) if workers is None else _apart(workers, folder)
        for part in parts:
            if time.monotonic() >= end:
                record = _record(part, "left out", f"the {minutes:g} minutes were over")
            else:
                record = _done(part, do, end)
            figures["parts"].append(record)
            figures["seconds"] = time.monotonic() - start
            print(f"{record['state']}: {part.name}: {record['found']}", flush=True)
            if output is not None:
                write_json(output, figures)
    rows = [(p["name"], p["state"], f"{p['seconds']:.0f} s", p["found"]) for p in figures["parts"]]
    print_table(f"{figures['device']}, in {figures['seconds']:.0f} s", rows)
    return figures


def _head(minutes: float, tiny: bool) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "title": "a GPU's first minutes",
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "is_rehearsal": tiny,
        "minutes": minutes,
        "seconds": 0.0,
        "parts": [],
    }


def _record(part: Part, state: str, found: str, seconds: float = 0.0) -> dict[str, Any]:
    return {"name": part.name, "state": state, "found": found, "seconds": seconds, "figures": {}}


def _done(part: Part, do: Do, end: float) -> dict[str, Any]:
    """A part; where memory does not suffice, again with half the batch."""
    share = 1.0
    while True:
        seconds = min(LONGEST, end + GRACE - time.monotonic())
        record = do(part, share, seconds)
        share = record.get("batch_share", share) / 2
        is_again = record.get("ran_out_of_memory") and part.batch_size and share >= _LEAST_SHARE
        if not is_again or time.monotonic() >= end:
            return record
        print(f"{part.name}: out of memory; again with {share:g} of the batch", flush=True)


def _here(folder: Path, tiny: bool) -> Do:
    def do(part: Part, share: float, seconds: float) -> dict[str, Any]:
        return do_part(part.name, share, _own(folder, part, share), tiny=tiny)

    return do


def _apart(workers: Workers, folder: Path) -> Do:
    def do(part: Part, share: float, seconds: float) -> dict[str, Any]:
        own = _own(folder, part, share)
        job = {"name": part.name, "share": share, "folder": str(own), "result": f"{own}.json"}
        start = time.monotonic()
        answer = workers.do(job, seconds)
        if isinstance(answer, str):
            return _record(part, "failed", answer, time.monotonic() - start)
        return answer

    return do


def _own(folder: Path, part: Part, share: float) -> Path:
    return folder / f"{part.name.replace(' ', '_').replace('/', '_')}_{share:g}"
