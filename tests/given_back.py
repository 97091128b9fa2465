"""What a process holds: descriptors, threads, child processes, temporary files. Tests give back what they take."""

import gc
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter

import psutil

_PATIENCE_SECONDS = 5
# What libraries keep by design until the process ends, as long as it is used or not.
_KEPT = re.compile(
    r"descriptor .*/mpl-data/fonts/.*"  # matplotlib's fonts
    r"|thread tqdm_monitor"
    r"|file (\w*wandb-(media|artifacts)|pymp-\w*|torchinductor_\w*)"  # wandb, loader processes, torch.compile
)
_TOGETHER = {
    # fsspec's event loop for all reading, with the pair of sockets that wakes it.
    "thread fsspecIO": {"descriptor anon_inode:[eventpoll]": 1, "descriptor socket": 2},
    # The process that is forked for others (processes.py), and what ends them with this one.
    "process .*multiprocessing.forkserver .*": {"descriptor pipe": 1},
    "process .*multiprocessing.resource_tracker .*": {"descriptor pipe": 1},
}


def held() -> Counter[str]:
    """What this process holds now, each with its number."""
    things: Counter[str] = Counter()
    if sys.platform != "linux":  # others don't tell
        return things
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # of the listing itself
            continue
        things["descriptor " + re.sub(r"^(socket|pipe):.*", r"\1", target)] += 1
    things.update(f"thread {thread.name}" for thread in threading.enumerate())
    for child in psutil.Process().children(recursive=True):
        try:
            things["process " + " ".join(child.cmdline()[:6] or [child.status()])] += 1
        except psutil.NoSuchProcess:
            continue
    things.update(f"file {name}" for name in os.listdir(tempfile.gettempdir()))
    return things


def taken_since(before: Counter[str]) -> list[str]:
    """What is held beyond ``before`` and not kept by design.

    Threads and connections take a moment to end once nobody needs them, and garbage may hold some, so it looks again
    for a few seconds.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (new := _new(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    return new


def _new(before: Counter[str]) -> list[str]:
    now = held()
    new = now - before
    for pattern, kept in _TOGETHER.items():
        for thing in [t for t in new if re.fullmatch(pattern, t)]:
            new.subtract({thing: 1} | kept)
    return sorted(
        f"{number} x {thing}"
        for thing, number in new.items()
        if number > 0 and not _KEPT.fullmatch(thing)
    )
