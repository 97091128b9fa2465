"""Does one part of ``benchmark gpu``: in a process of its own, so that what breaks there breaks nothing else."""

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import figures_of
from benchmarks.gpu.device_checks import CHECKS
from benchmarks.gpu.finding import Finding, Skipped, told
from benchmarks.gpu.parts import PARTS, Part
from semtok.storage import write_json
from semtok.training.accumulation import device_gb


def do_part(name: str, share: float, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Does a part, and says what came of it; no error leaves this function.

    Args:
        share: of the batch, at most; a GPU with less memory takes less.
        folder: for what the part writes; made here.
    """
    part = next(part for part in PARTS if part.name == name)
    start = time.perf_counter()
    folder.mkdir(parents=True)
    ran_out = False
    try:
        if torch.cuda.is_available():
            gpu = device_gb(torch.device("cuda"))
            share = min(share, part.share(gpu)) if gpu is not None else share
        finding = _finding(part, share, folder, tiny)
    except Skipped as why:
        finding = Finding("skipped", str(why))
    except ModuleNotFoundError as error:
        finding = Finding("skipped", f"{error.name} is not installed")
    except Exception as error:  # whatever it is, the other parts are done all the same
        traceback.print_exc()
        ran_out = isinstance(error, torch.OutOfMemoryError)
        finding = Finding("failed", told(error))
    return {
        "name": name,
        "state": finding.state,
        "found": finding.line,
        "seconds": time.perf_counter() - start,
        "batch_share": share,
        "ran_out_of_memory": ran_out,
        "figures": finding.figures,
    }


def _finding(part: Part, share: float, folder: Path, tiny: bool) -> Finding:
    if not part.words:
        return CHECKS[part.name](tiny, folder)
    words = part.command(share, tiny=tiny)
    print(f"benchmark {' '.join(words)}", flush=True)
    figures = figures_of(words, folder)
    line = _line(figures)
    if part.batch_size and not tiny:
        line = f"batch {int(share * part.batch_size)}: {line}"
    return Finding("measured", line, {"words": words, **figures})


def _line(figures: dict[str, Any]) -> str:
    """Of what ``benchmark`` reports, what its readers look for first."""
    found = []
    for row in figures["rows"]:
        if "gain" in row:
            found.append(f"{row['trick']} {row['gain']:.2f}")
            continue
        share = f" ({row['of matmul']:.0%} of a matrix product)" if row["of matmul"] else ""
        found.append(f"{row['what']}: {row['images/s']:.4g} images/s{share}")
    if "ratio" in figures:
        found.append(figures["ratio"])
    if "loss_differences" in figures:
        most = max(figures["loss_differences"].values())
        found.append(f"losses {most:.2%} apart")
    if "peak_memory_gb" in figures:
        found.append(f"at most {figures['peak_memory_gb']:.3g} GB")
    line = "; ".join(found)
    # What both sides share tells nothing.
    sides = [set(row["what"].split()) for row in figures["rows"] if "what" in row]
    for word in set.intersection(*sides) if len(sides) == 2 else ():
        line = line.replace(f"{word} ", "") if "=" in word else line
    return line


def main() -> None:
    """Has all imported, waits for a line of JSON that says which part, and writes what came of it."""
    if not (line := sys.stdin.readline().strip()):
        return  # nobody needs it any more
    job = json.loads(line)
    record = do_part(job["name"], job["share"], Path(job["folder"]), tiny=False)
    write_json(Path(job["result"]), record)


if __name__ == "__main__":
    main()
