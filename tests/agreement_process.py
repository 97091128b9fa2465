"""What one of two processes that train together does, and tells as JSON."""

import contextlib
import errno
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from semtok.commands.around_training import at_work
from semtok.errors import Interrupted, UserError
from semtok.lock import InUse, only_one_in
from semtok.recipe import parse_recipe
from semtok.training.loop import Trainer

# BatchNorm in the averaged network and in another learner; no step is logged before the last.
SETTINGS: dict[str, Any] = {"log_every": 1000, "steps": 1000, "schedule": "constant"}
REGLUE = tiny.SEMANTICS["reglue"]
GAN = {"name": "vae", "adversarial": tiny.ADVERSARIAL | {"norm": "batch"}}


def started(folder: Path, method: dict[str, Any], **settings: Any) -> Trainer:
    texture = tiny.measured({"name": "vae"}) if method["name"] in tiny.COMPOSITES else None
    return tiny.trainer(folder, method, texture=texture, **settings)


def running_statistics(trainer: Trainer) -> list[float]:
    """A digest of each buffer that BatchNorm keeps, of learners and of their average."""
    networks = [trainer.objective.learners, *([trainer.ema.module] if trainer.ema else [])]
    buffers = [b for network in networks for n, b in network.named_buffers() if "running_" in n]
    assert buffers
    return [buffer.double().sum().item() for buffer in buffers]


def train(folder: Path, method: dict[str, Any]) -> Trainer:
    """Three steps, each process on its own share."""
    trainer = started(folder, method, **SETTINGS)
    trainer.objective.learners.train()
    batches = trainer._batches()
    for _ in range(3):
        trainer.train_step(batches)
    return trainer


def stop(folder: Path, rank: int) -> tuple[int, str]:
    """The second process is asked to stop in its third step; at which step this one did."""
    trainer = started(folder, {"name": "vae"}, **{**SETTINGS, "steps": 12})
    step = trainer.train_step

    def spy(batches: Any) -> None:
        step(batches)
        if rank == 1 and trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_step = spy
    try:
        trainer.run()
    except Interrupted as stopped:
        return trainer.step, stopped.checkpoint.name
    return trainer.step, "not stopped"


def stop_aside(folder: Path) -> tuple[str, str]:
    """The first process gets SIGUSR1 while it draws a picture and the second waits; what this one is told."""
    trainer = started(folder, {"name": "vae"}, **{**SETTINGS, "steps": 12, "sample_every": 3})

    def picture(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)

    trainer.held_out = SimpleNamespace(picture=picture)
    try:
        trainer.run()
    except Interrupted as stopped:
        return signal.Signals(stopped.signal_number).name, stopped.checkpoint.name
    return "not stopped", ""


def in_use(folder: Path, rank: int) -> str:
    """Another run is at work in the folder; what this process is told."""
    recipe = parse_recipe(tiny.content({"name": "vae"}), "tiny")
    with contextlib.nullcontext() if rank else only_one_in(folder, "a run"):
        try:
            with at_work(folder, recipe, resume=False):
                return "nothing"
        except InUse as error:
            return str(error)


def fail_to_save(folder: Path) -> str:
    """The first process, which writes checkpoints, finds the disk full; what this one raises."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = started(folder, {"name": "vae"}, **{**SETTINGS, "steps": 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semtok.training.checkpoint.save_checkpoint", full)
        try:
            trainer.save()
        except (UserError, OSError) as error:
            return str(error)
    return "nothing"


def see(root: str) -> None:
    """Writes ``RANK.json`` of what was seen on the way."""
    folder, rank = Path(root), int(os.environ["RANK"])
    seen: dict[str, Any] = {}
    trainer = train(folder / "reglue", REGLUE)
    seen["compressor"] = running_statistics(trainer)
    seen["discriminator"] = running_statistics(train(folder / "gan", GAN))

    trainer.skipped[f"image {rank}"] = "cut short"
    trainer.save()
    seen["logged"] = trainer.metrics.read(trainer._mean_over_processes)
    resumed = started(folder / "reglue", REGLUE, **SETTINGS)
    resumed.resume()
    seen["skipped"] = sorted(resumed.skipped)
    seen["own_after_resuming"] = resumed.metrics.read()
    seen["logged_after_resuming"] = resumed.metrics.read(resumed._mean_over_processes)
    seen["stopped"] = stop(folder / "stop", rank)
    seen["aside"] = stop_aside(folder / "aside")
    seen["in_use"] = in_use(folder / "in_use", rank)
    seen["full"] = fail_to_save(folder / "full")
    (folder / f"{rank}.json").write_text(json.dumps(seen))
