"""The one training loop. A stage plugs in an ``Objective``; nothing here knows what it learns."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from semtok import heartbeat, stopping
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageBatch, ImageSource
from semtok.errors import Interrupted, UserError, printable
from semtok.objective import PREVIOUS, Batch, Objective, StepOutput
from semtok.pictures import write_png
from semtok.processes import gather, interruptible, num_processes, together
from semtok.sampler.draws import Draws
from semtok.speed import compile_networks, set_convolutions, use_channels_last
from semtok.stopping import When
from semtok.training.accumulation import device_gb, micro_batches
from semtok.training.agreement import RunningStatistics, StopVote
from semtok.training.averages import AVERAGES, PowerAverages
from semtok.training.checkpoint import (
    Keeper,
    keep_newest,
    load_checkpoint,
    random_state,
    restore_random_state,
    step_of,
)
from semtok.training.ema import ModelEMA
from semtok.training.health import Health
from semtok.training.held_out import HeldOut
from semtok.training.inputs import in_float32, on_device, teacher_blocks
from semtok.training.log import MetricSums, RunLog, non_finite
from semtok.training.neighbours import previous_of
from semtok.training.optimisers import Optimisers
from semtok.training.scoring import Scores, Scoring
from semtok.training.sharding import Sharding
from semtok.training.train_config import TrainConfig


class Trainer:
    """Trains an objective on a source and keeps its run folder.

    All state that has to survive an interruption stands in ``_modules`` and ``_state``, which
    saving and loading both walk.

    Args:
        folder: the run's; ``metrics.jsonl``, ``samples/`` and ``checkpoints/`` are written there.
        tracked: settings to show in the tracker, by dotted key.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        folder: Path,
        source: ImageSource,
        validation: ImageSource,
        num_workers: int,
        tracked: dict[str, int | float | str | bool],
    ) -> None:
        self.objective, self.config, self.folder = objective, config, folder
        self.accelerator, self.device = accelerator, accelerator.device
        self.source, self.validation, self.num_workers = source, validation, num_workers
        self.log: RunLog | None = None  # while it runs
        self.tracked = tracked
        # Of all GPUs the smallest counts: processes share each micro-batch equally.
        sizes = [size for size in gather(device_gb(self.device)) if size is not None]
        self.accumulate, self.memory_line = micro_batches(
            config, accelerator.num_processes, min(sizes, default=None)
        )
        self.share = BatchSlice(
            config.batch_size,
            self.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
        )
        if objective.compares_neighbours() and config.batch_size < 2:
            raise UserError(
                "train.batch_size: contrastive flow matching compares the images of a batch; pass at least 2, or "
                "diffusion.contrastive_weight=0"
            )
        self.held_out = HeldOut(
            objective,
            validation,
            self.share.micro_batch_size,
            lambda images: self._prepared(images),
        )
        self.keeper = Keeper(folder, config)
        networks = [objective.learners, *objective.frozen_modules()]
        self.sharding = Sharding(objective, config, self.device)
        for module in networks:
            module.to(self.device)
        set_convolutions(networks, config.precision)
        if config.channels_last and not use_channels_last(networks):
            raise UserError("train.channels_last: no network here has a convolution; leave it out")
        self.ema, self.averages = self._followers()
        compile_networks([*objective.compiled_modules(), *teacher_blocks(networks)], config.compile)
        self.learners = {
            name: accelerator.prepare_model(p, evaluation_mode=self.sharding.shares(name))
            for name, p in objective.learners.items()
        }
        self.optimisers = Optimisers(objective, config, accelerator)
        self._running_statistics = RunningStatistics(objective.learners)
        self.metrics = MetricSums()
        self.health = Health(self.device, config.batch_size, accelerator.gather)
        self.step, self.seconds = 0, 0.0
        self.skipped: dict[str, str] = {}  # unreadable files, and why
        self.scores = Scores()
        self.scoring: Scoring | None = None  # by ``score_by``
        self._vote = StopVote()
        self._mark()

    def _followers(self) -> tuple[ModelEMA | None, PowerAverages | None]:
        """The averages of the weights that this run asks for."""
        config, ema, averages = self.config, None, None
        if self.objective.learners:
            module = self.objective.averaged_module()
            if config.ema_decay is not None:
                copied = self.sharding.copied
                ema = ModelEMA(module, config.ema_decay, warmup=config.ema_warmup, copied=copied)
            if config.averages is not None:
                averages = PowerAverages(module, config.averages, self.folder / AVERAGES)
        return ema, averages

    # State that survives ------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        return (
            {"learners": self.objective.learners}
            | ({"ema": self.ema.module} if self.ema is not None else {})
            | (self.averages.modules() if self.averages is not None else {})
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds + time.perf_counter() - self._marked_time,
            "skipped": sorted(self.skipped),
            "ema_updates": self.ema.num_updates if self.ema is not None else 0,
            **self.optimisers.state_dict(),
            "metrics": self.metrics.state_dict(self._mean_over_processes),
            "scores": self.scores.state_dict(),
            "jumps": self.health.jumps.state_dict(),
        }

    def save(self) -> Path:
        """Writes a checkpoint of this step, or begins to, after checking that what it holds is finite."""
        self._check_finite(self.metrics.read(self._mean_over_processes))
        self._warn_of(*gather(self.skipped))
        state = {**self._state(), "random": gather(random_state())}
        return self.keeper.save(self.step, self._modules(), state)

    def resume(self) -> None:
        """Goes back to the newest checkpoint; without any, to the start.

        Raises:
            UserError: the checkpoint is damaged, or of other networks.
        """
        checkpoints = self.keeper.kept()
        if self.averages is not None:
            step = step_of(checkpoints[-1]) if checkpoints else 0
            self.averages.go_back(step, forget=self.accelerator.is_main_process)
        if not checkpoints:
            return
        state = load_checkpoint(
            checkpoints[-1], modules=self._modules(), parameters=self.optimisers.parameters
        )
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped = dict.fromkeys(state["skipped"], "")
        if self.ema is not None:
            self.ema.num_updates = state["ema_updates"]
        self.optimisers.load_state_dict(state)
        self.metrics.load_state_dict(state["metrics"], self.device)
        self.scores.load_state_dict(state.get("scores", {}))
        self.health.jumps.load_state_dict(state.get("jumps", {}))
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_state(state["random"][self.accelerator.process_index])
        if self.accelerator.is_main_process:  # which a process that was killed may have begun
            keep_newest(self.keeper.folder, self.config.keep_last)

    def score_by(self, scoring: Scoring) -> None:
        """From now on scores are taken on the way. Called after ``resume``."""
        self.scores.begin(scoring.targets)
        self.scoring = scoring

    # The loop -----------------------------------------------------------------------------------

    def run(self, export: Callable[[nn.Module, int], None] | None = None) -> nn.Module:
        """Trains to the last step and returns the module to evaluate and export: the EMA's, or the trained one.

        Args:
            export: asked for after each step of ``train.export_at``, in all processes, with a copy of that
                module as it is then, and the step.

        Raises:
            Interrupted: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was written, if there were steps. Signals
                are heard in the main thread alone, see ``stopping.listening``.
            NonFiniteLoss: a loss term is NaN or infinite; no checkpoint holds such weights.
        """
        config = self.config
        self.log = RunLog(
            self.folder,
            total_steps=config.steps,
            first_step=self.step,
            is_main=self.accelerator.is_main_process,
        )
        if config.tracker != "none":
            self.accelerator.init_trackers("semtok", config=self.tracked)
        if self.ema is not None and not self.step:
            self.ema.restart()
        batches = self._batches()
        self.objective.learners.train()
        self._mark()
        try:
            with stopping.listening(), interruptible(), self._vote:
                self._run(batches, export)
        finally:
            self.log.close()
            self.keeper.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.averaged

    def _run(
        self, batches: Iterator[ImageBatch], export: Callable[[nn.Module, int], None] | None
    ) -> None:
        config = self.config
        if (
            self.step in config.export_at
        ):  # which a run that was killed after its checkpoint may lack
            self._export(export)
        if self.step and self._is_to_be_scored():  # a signal may have come before
            self._pause(self._score)
        if not config.steps or (self.step and self._is_to_be_shown()):
            self._pause(self._sample)
        with stopping.obeyed(When.LATER):  # at the end of a step
            while self.step < config.steps:
                self._one_step(batches, export)
            self._pause(self.keeper.wait)

    def _one_step(
        self, batches: Iterator[ImageBatch], export: Callable[[nn.Module, int], None] | None
    ) -> None:
        """A step, and what is due after it."""
        config = self.config
        self.train_step(batches)
        self.log.step_done()
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._log()
        if self.averages is not None and self.averages.is_due(self.step):  # a stop is no excuse
            self._pause(self._write_averages)
        if self._vote.should_stop():
            raise self._stopped(stopping.received())
        if self._is_to_be_scored():
            if self.device.type == "cuda":  # what is still under way there is training
                torch.cuda.synchronize(self.device)
            self._aside(self._score)
        if self._is_to_be_shown():
            self._aside(self._sample)
        if self.step % config.checkpoint_every == 0 or self.step == config.steps:
            self._pause(self.save)
        if self.step in config.export_at:
            self._aside(lambda: self._export(export))

    def _is_to_be_shown(self) -> bool:
        return self.step % self.config.sample_every == 0 or self.step == self.config.steps

    def _is_to_be_scored(self) -> bool:
        if self.scoring is None or self.scores.step == self.step:
            return False
        return self.step % self.scoring.every == 0 or self.step == self.config.steps

    def _aside(self, work: Callable[[], None]) -> None:
        """Does something that is not training and takes its time: a signal stops it at once."""
        try:
            with stopping.obeyed(When.AT_ONCE if num_processes() == 1 else When.AGREED):
                self._pause(work)
        except Interrupted as stopped:
            raise self._stopped(stopped.signal_number) from None

    def _stopped(self, number: int) -> Interrupted:
        """After a checkpoint of this step is written."""
        checkpoint = self._pause(self.save)
        self._pause(self.keeper.wait)
        return Interrupted(number, checkpoint=checkpoint)

    def train_step(self, batches: Iterator[ImageBatch]) -> None:
        """One optimiser step of every active learner. Nothing here waits for the device."""
        active = self.objective.active_learners(self.step)
        in_turn = self.objective.steps_in_turn() and len(active) > 1
        # Learners that take turns read the same micro-batches again.
        each = self._inputs_of_step(batches)
        prepared = list(each) if in_turn else each
        left: dict[int, dict[str, Tensor]] = {}
        for group in [[name] for name in active] if in_turn else [active]:
            for micro_step, inputs in enumerate(prepared):
                carry = self._backward(group, inputs, left.get(micro_step, {}), micro_step)
                if in_turn:
                    left[micro_step] = carry
            self._note(self.optimisers.step(group))
        self._running_statistics.average()
        if self.ema is not None:
            self.ema.update()
        if self.averages is not None:
            self.averages.update()
        self.step += 1
        heartbeat.mark(self.step)

    def _backward(
        self, group: list[str], inputs: dict[str, Any], carry: dict[str, Tensor], micro_step: int
    ) -> dict[str, Tensor]:
        """Gradients of these learners for a micro-batch; gives what they leave to the next ones."""
        draws = Draws(
            seed=self.config.seed,
            step=self.step,
            global_batch=self.config.batch_size,
            first=self.share.first(micro_step),
            num=self.share.micro_batch_size,
            device=self.device,
        )
        for name in group:
            learner = self.learners[name]
            is_last = micro_step == self.accumulate - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(learner):
                with self.health.clock.computing():
                    output = learner(inputs, draws, self.step, carry)
                self.accelerator.backward(self._total(output) / self.accumulate)
            carry = {**carry, **output.carry}
        return carry

    def _inputs_of_step(self, batches: Iterator[ImageBatch]) -> Iterator[dict[str, Any]]:
        """What the objective makes of each micro-batch of this process."""
        each = (self._next_inputs(batches) for _ in range(self.accumulate))
        if not self.objective.compares_neighbours():
            yield from each
            return
        prepared = list(each)  # the image before the first of them is in the last
        last = [inputs["posterior"].map(lambda part: part[-1:]) for inputs in prepared]
        before = previous_of(last, self.share.process_index, self.accelerator.gather)
        for inputs, posterior in zip(prepared, before, strict=True):
            yield inputs | {PREVIOUS: posterior}

    def _next_inputs(self, batches: Iterator[ImageBatch]) -> dict[str, Any]:
        with self.health.clock.loading():
            images = next(batches)
        with self.health.clock.computing():
            return self._prepared(images)[1]

    def _batches(self) -> Iterator[ImageBatch]:
        order = DataOrder(
            len(self.source),
            self.config.batch_size,
            self.config.seed,
            self.source.flip,
            self.source.block_size,
            self.source.crop,
        )
        return training_batches(
            self.source,
            order,
            self.share,
            first_step=self.step,
            last_step=self.config.steps,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def _prepared(self, images: ImageBatch) -> tuple[Batch, dict[str, Any]]:
        """What a source loaded, on the device, and what the objective makes of it, in steps and in
        validation alike: teachers under autocast, their features handed on in float32."""
        self._warn_of({skipped.name: skipped.reason for skipped in images.skipped})
        batch = on_device(images, self.device)
        with self.accelerator.autocast():
            inputs = self.objective.prepare(batch)
        return batch, {name: in_float32(value) for name, value in inputs.items()}

    def _warn_of(self, *skipped: dict[str, str]) -> None:
        """Tells of files that could not be read, once of each, and why."""
        reasons = {name: reason for part in skipped for name, reason in part.items()}
        for name in sorted(reasons.keys() - self.skipped.keys()):
            self.skipped[name] = reasons[name]
            why = f" ({reasons[name]})" if reasons[name] else ""
            say = self.log.say if self.log is not None else print
            say(
                f"warning: {printable(name)} can't be read as an image{why}; another image takes its place"
            )

    def _total(self, output: StepOutput) -> Tensor:
        means = {name: term.value.mean() for name, term in output.terms.items()}
        self._note({f"loss/{name}": mean for name, mean in means.items()})
        self._note({f"metric/{name}": value for name, value in output.metrics.items()})
        adaptive = {n: t.weight for n, t in output.terms.items() if isinstance(t.weight, Tensor)}
        self._note({f"weight/{name}": weight for name, weight in adaptive.items()})
        weighted = [term.weight * means[name] for name, term in output.terms.items()]
        return torch.stack(weighted).sum()

    def _note(self, values: dict[str, Tensor]) -> None:
        self.metrics.add(
            values, step=self.step + 1
        )  # steps are counted from 1 wherever people see them

    # Around the loop ----------------------------------------------------------------------------

    @property
    def averaged(self) -> nn.Module:
        """What is evaluated and exported, whole: where processes share it out all have to ask."""
        return self.sharding.whole(self._followed)

    @property
    def _followed(self) -> nn.Module:
        """The same, as processes hold it."""
        return self.ema.module if self.ema is not None else self.objective.averaged_module()

    def _log(self) -> None:
        values = self.metrics.read(self._mean_over_processes)
        self._check_finite(values)
        by_step = self.metrics.read_steps(self._mean_over_processes)
        self.metrics.clear()
        now = time.perf_counter()
        steps, seconds = self.step - self._marked_step, now - self._marked_time
        rate = steps * self.config.batch_size / seconds
        self.seconds += seconds
        self._mark()
        rates = {f"lr/{name}": lr for name, lr in self.optimisers.learning_rates().items()}
        health, details, lines = self.health.report(by_step, num_steps=steps, seconds=seconds)
        values = {**values, **rates, **health, "images_per_second": rate, "seconds": self.seconds}
        left = (self.config.steps - self.step) * self.config.batch_size / rate
        self.log.metrics(self.step, values, seconds_left=left, details=details)
        for line in lines:
            self.log.say(f"warning: {line}")
        if self.config.tracker != "none":
            self.accelerator.log(values, step=self.step)

    def _check_finite(self, values: dict[str, float]) -> None:
        if all(math.isfinite(value) for value in values.values()):
            return
        first_bad: dict[str, int] = {}
        for steps in gather(self.metrics.first_bad_steps()):
            first_bad |= {
                name: min(step, first_bad.get(name, step)) for name, step in steps.items()
            }
        checkpoints = self.keeper.kept()
        raise non_finite(first_bad, last_good=checkpoints[-1] if checkpoints else None)

    def _mark(self) -> None:
        self._marked_step, self._marked_time = self.step, time.perf_counter()

    def _pause(self, work: Any) -> Any:
        """Does something that is not training, without its time entering the rates."""
        start = time.perf_counter()
        result = work()
        self._marked_time += time.perf_counter() - start
        return result

    def _export(self, export: Callable[[nn.Module, int], None] | None) -> None:
        assert export is not None, "train.export_at asks for exports, and nobody makes them"
        self._check_finite(self.metrics.read(self._mean_over_processes))
        before = random_state()
        averaged = self.averaged
        # What was gathered is a copy already.
        export(copy.deepcopy(averaged) if averaged is self._followed else averaged, self.step)
        restore_random_state(before)

    def _write_averages(self) -> None:
        self._check_finite(self.metrics.read(self._mean_over_processes))
        with together():
            if self.accelerator.is_main_process:
                self.averages.write(self.step)

    def _score(self) -> None:
        """Takes scores. Weights and random numbers stay as they are."""
        assert self.scoring is not None
        seconds = self.seconds + time.perf_counter() - self._marked_time
        before = random_state()
        with self.held_out.evaluating():
            scores = self.scoring.measure(self.averaged)
        restore_random_state(before)
        images = self.step * self.config.batch_size
        self.scores.note(scores, step=self.step, images=images, seconds=seconds)
        values = {f"score/{name}": value for name, value in scores.items()}
        self.log.scores(self.step, {**values, "seconds": seconds})
        if self.config.tracker != "none":
            self.accelerator.log(values, step=self.step)

    def _sample(self) -> None:
        averaged = self.averaged
        with together():
            if self.accelerator.is_main_process:
                self._draw_samples(averaged)
                self.log.draw_curves()

    def _draw_samples(self, averaged: nn.Module) -> None:
        picture = self.held_out.picture(averaged, self.config.num_sample_images)
        if picture is not None:
            write_png(self.folder / "samples" / f"step_{self.step:08d}.png", picture)

    def validate(self) -> dict[str, float]:
        """Held-out metrics of the averaged weights, over ``num_validation_images``, shared among processes."""
        return self.held_out.metrics(self.averaged, self.config.num_validation_images)

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean")
