"""A job, run once whole, then killed and started again until it has ended, as often as there are kills for it."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semtok.errors import UserError
from soaking.comparing import differences
from soaking.jobs import JOBS, KILLED, WHOLE, Job, fresh
from soaking.killing import Moment, Pace, Start, draw_kill, run_once
from soaking.warm import Warm

_LIMIT_SECONDS = 120.0
_LIMIT_FACTOR = 20
_KILLS_OF_A_ROUND = 4


@dataclass
class Result:
    """What a job's kills came to.

    Attributes:
        whole: seconds of the uninterrupted run.
        kills: that hit, by their moments.
        rounds: fresh folders in which the command ended, each compared with the uninterrupted run's.
        findings: what differed, hung, or was left.
    """

    job: Job
    whole: float = 0.0
    kills: Counter[Moment] = field(default_factory=Counter)
    restarts: int = 0
    rounds: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        """Over all moments."""
        return sum(self.kills.values())

    def note(self, start: Start, place: str) -> None:
        """What a start of the command tells."""
        if start.killed is not None:
            self.kills[start.killed] += 1
        if start.orphans:
            self.findings.append(f"{place}: {start.orphans} processes went on after it was killed")
        if "Traceback" in start.output:
            self.findings.append(f"{place}: a traceback")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "job": self.job.name,
            "command": " ".join(("semtok", *self.job.words)),
            "whole_seconds": round(self.whole, 1),
            "kills": {moment.value: self.kills[moment] for moment in Moment},
            "restarts": self.restarts,
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "equal": not self.findings,
            "findings": self.findings,
        }


class Soak:
    """Kills jobs in a folder.

    Args:
        folder: of this soak; holds the inputs.
        deadline: of ``time.monotonic``, after which nothing more is killed.
        warm: forks the commands; None: they start as users start them.
    """

    def __init__(
        self, folder: Path, *, seed: int, deadline: float, warm: Warm | None = None
    ) -> None:
        self.folder, self.seed, self.deadline, self.warm = folder, seed, deadline, warm
        self._paces: dict[str, Pace] = {}

    def run(self, jobs: Sequence[Job], num_kills: int) -> Iterator[Sequence[Result]]:
        """Kills jobs so often together, in turn, unless the time is over; of one with a finding no more.

        Yields:
            the results of all, whenever one has changed.
        """
        results = [Result(job) for job in jobs]
        shares = [
            num_kills * (n + 1) // len(jobs) - num_kills * n // len(jobs) for n in range(len(jobs))
        ]
        is_open = True
        while is_open:
            is_open = False
            for result, share in zip(results, shares, strict=True):
                if result.num_kills < share and not result.findings and self._has_time():
                    is_open = True
                    self._round(result, share)
                    yield results

    def _has_time(self) -> bool:
        return time.monotonic() < self.deadline

    def _whole(self, job: Job) -> Pace:
        """The pace of the uninterrupted run, which is run where it was not yet."""
        if job.name in self._paces:
            return self._paces[job.name]
        if job.needs is not None:
            self._whole(next(other for other in JOBS if other.name == job.needs))
        folder = fresh(self.folder / job.name / WHOLE)
        log = folder.with_name(f"{WHOLE}.log")
        own = {"kill": None, "pace": Pace(0.0, 0.0, 0), "seconds": _LIMIT_FACTOR * _LIMIT_SECONDS}
        start = run_once(job.words, folder, log, **own, warm=self.warm)
        if start.code:
            raise UserError(f"{job.name}: failed before anything was killed; see {log}")
        self._paces[job.name] = start.pace
        return start.pace

    def _round(self, result: Result, num_kills: int) -> None:
        """Kills the command in a fresh folder, until it ends by itself."""
        job, begun = result.job, time.monotonic()
        pace = self._whole(job)
        result.whole = pace.start + pace.work
        folder, place = fresh(self.folder / job.name / KILLED), f"round {result.rounds + 1}"
        for number in range(_KILLS_OF_A_ROUND + 1):
            has_kills = number < _KILLS_OF_A_ROUND and result.num_kills < num_kills
            chance = random.Random(f"{self.seed} {job.name} {result.rounds} {number}")
            start = run_once(
                job.words,
                folder,
                folder.with_name(f"{KILLED}.{result.rounds}.{number}.log"),
                kill=draw_kill(chance) if has_kills and self._has_time() else None,
                pace=pace,
                seconds=_LIMIT_SECONDS + _LIMIT_FACTOR * result.whole,
                warm=self.warm,
            )
            result.restarts += number > 0
            result.note(start, f"{place}, start {number + 1}")
            if start.killed is None:
                break
        if not _has_ended(start, job):
            result.findings.append(f"{place}: ended with {start.code}")
        whole = self.folder / job.name / WHOLE
        result.findings += [f"{place}: {line}" for line in differences(whole, folder)]
        result.rounds += 1
        result.seconds += time.monotonic() - begun


def _has_ended(start: Start, job: Job) -> bool:
    """Whether the command has done its work, now or before it was killed."""
    return not start.code or (job.is_done is not None and job.is_done in start.output)
