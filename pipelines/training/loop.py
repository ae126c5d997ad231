"""The loop every worker runs, for every stage: read, step, average, validate, checkpoint, resume, report."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pipelines.features.store import FeatureStore
from pipelines.tracking import Tracker
from pipelines.training.checkpoint import EMA, Checkpoints, TrainingState, full_weights
from pipelines.training.dataset import ClipDataset, Examples, Share, step_rng, training_batches, validation_batches
from pipelines.training.guards import LOSS, Guard, listed
from pipelines.training.identity import AT_START, measured_at_start
from pipelines.training.job import TrainJob
from pipelines.training.order import Order
from pipelines.training.precision import DTYPES, faster, measure, settled, tensor_float32, untouched
from pipelines.training.watch import Watch
from pipelines.training.workers import Workers, shard
from stages.base import Stage, release, stage_class
from stages.config import Recipe, to_dict
from stages.errors import UserError
from stages.files import Place
from stages.lora import attach, save_adapters
from stages.starting import start_from

LOG_EVERY = 10  # steps
TELL_EVERY = 5.0  # seconds
NAMED = 5  # steps left out whose clips are named
PATIENCE = 20  # steps in a row without finite gradients before the run is given up


Losses = Iterator[tuple[str, Tensor, dict[str, Tensor]]]  # what `Stage.losses` returns: part, loss, logs


def train(job: TrainJob, workers: Workers) -> dict[str, float]:
    """Train one stage to the end of its recipe and release its weights; returns the last validation measures.

    Called by every worker. A run that finds a checkpoint continues from it.
    """
    with closing(Checkpoints(Place.of(job.run), workers.rank, job.recipe.keep_every)) as checkpoints:
        return _train(job, workers, checkpoints)


def _train(job: TrainJob, workers: Workers, checkpoints: Checkpoints) -> dict[str, float]:
    recipe, device = job.recipe, workers.device
    cls = stage_class(job.stage)
    series = cls.reads(job.variant)
    store = FeatureStore.open(job.store)
    clips = ClipDataset(store, cls, series, "train", job.corpora, job.turns)
    held_out = ClipDataset(store, cls, series, "validation", job.corpora)
    if not len(held_out):
        held_out = clips

    torch.manual_seed(job.seed)  # equal first weights on every worker
    stage, begun = cls.build(job.variant, job.folder), checkpoints.whole()
    if job.start and (job.lora or not begun):  # checkpoints of adapters leave out what these adapt
        started = start_from(stage, job.start_folder() or Path(), job.start[0], job.allow)
        if workers.rank == 0:
            print(f"{job.stage} {started.summary()}", file=sys.stderr)
    if job.lora:
        attach(stage, job.lora)
    stage = stage.to(device)
    parts = shard(stage, init_device_mesh(device.type, (workers.world,)))
    optimizers = {name: _optimizer(part, recipe) for name, part in parts.items()}
    ema = EMA(parts, recipe.ema_decay, stage.averaged) if recipe.ema_decay else None
    state = TrainingState(parts, optimizers, ema, trained_only=bool(job.lora))
    if begun:
        checkpoints.resume(state, begun)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group.update(_settings(recipe))  # those of today's call, not of the one that wrote the checkpoint

    run = _Run(job, workers, stage, state, checkpoints)
    with Tracker.resume(job.tracker) if workers.rank == 0 else Tracker.off() as tracker:
        measures = run.fit(clips, held_out, tracker)
        measures, released = run.recall(held_out, measures)
        tracker.tags({"loa.released": json.dumps(released)})
        weights = run.gather()
        if workers.rank == 0:
            fresh = cls.build(job.variant, job.folder)
            if job.lora:
                attach(fresh, job.lora)
            for name, part in fresh.parts().items():
                part.load_state_dict(weights[name], strict=not job.lora)
            progress = run.progress
            card = {
                "variant": job.variant.name,
                "config": to_dict(job.variant),
                "steps": progress.step,
                "clips": progress.cursor,
                "seconds": round(progress.seconds, 1),
                "skipped_steps": progress.skipped,
                "precision": progress.precision,
                "epoch": job.epoch,
                "waited": progress.best.waited,
                "validation": measures,
                "released": released,
                **measured_at_start(Place.of(job.run)),
                **job.card,
            }
            release(fresh.eval(), job.output, card, save_adapters if job.lora else None)
    return measures


def _optimizer(part: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in part.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.learning_rate, fused=True, **_settings(recipe))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What of an optimiser stays the same from step to step."""
    return {"betas": recipe.betas, "eps": recipe.epsilon, "weight_decay": recipe.weight_decay}


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], weight: float = 1.0) -> None:
    """Add `weight` times each value to its sum, in float32 and on the values' device: reading one would make the host wait for it."""
    for name, value in values.items():
        term = (weight * value.detach()).float()
        sums[name] = sums[name] + term if name in sums else term


class _Run:
    """One worker's run: the state of the loop and its few steps."""

    def __init__(self, job: TrainJob, workers: Workers, stage: Stage, state: TrainingState, checkpoints: Checkpoints) -> None:
        self.job, self.recipe, self.workers, self.stage, self.state = job, job.recipe, workers, stage, state
        self.checkpoints = checkpoints
        self.progress, self.share = state.progress, Share(workers.rank, workers.world)
        self.progress.precision = settled(job.precision, stage.full_precision, self.progress.precision, self.recipe.steps)
        self.guard = Guard(stage.name, workers.rank, workers.world, job.steps_before)
        self.trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in state.parts.items()}
        # Steps in a row without finite gradients, by part: a critic goes on without its generator.
        self.stuck = dict.fromkeys(self.trained, 0)
        self.moved = dict.fromkeys(self.trained, False)  # whether any step of this call moved the part
        self.told = -math.inf  # when `_tell` last did

    def fit(self, clips: ClipDataset, held_out: ClipDataset, tracker: Tracker) -> dict[str, float]:
        """Step until the recipe is fulfilled, with everything that happens on the way."""
        recipe, progress = self.recipe, self.progress
        examples, order = Examples(clips, self.stage, self.job.seed), clips.order(self.job.seed)
        self.watch = Watch(self.job, self.stage.best_by, held_out, self.share, self.workers.device)
        batches = training_batches(examples, order, recipe, self.share, replace(progress), self.job.loader_workers)
        measures: dict[str, float] = {}
        if self.job.start and not progress.step:
            at_start = self._validate(held_out, tracker)
            if self.workers.rank == 0:
                (Place.of(self.job.run) / AT_START).write_json(at_start)
        sums: dict[str, Tensor] = {}
        before, clock = progress.seconds, time.monotonic()
        if not progress.precision:
            first = next(batches)
            self._measure_precision(first)
            batches = itertools.chain([first], batches)
        since, last = time.monotonic(), progress.step
        progress.seconds = before + since - clock
        done, kept = 1.0 if self.watch.gives_up(progress) else self._share_done(), True
        while done < 1.0:
            rate = self._set_rate(done, progress.cursor // order.length)
            left_out = progress.skipped
            with tensor_float32(self.workers.device):
                logs = self._step(next(batches))
            _add(sums, logs)
            self.guard.add(progress.step, progress.cursor, logs)
            if progress.skipped > left_out:
                self._name_clips(clips, order)
            progress.step += 1
            progress.cursor += recipe.global_batch
            progress.seconds = before + time.monotonic() - clock - self.watch.seconds
            done = self._share_done()
            if progress.step % LOG_EVERY == 0 or done >= 1.0:
                steps = progress.step - last
                means = {k: v / steps for k, v in self._mean(sums).items()}  # waits for the device, so before the clock
                self.guard.look(means, lambda cursor: self._clips_at(cursor, clips, order), tracker)
                means = {f"train/{k}": v for k, v in means.items()}
                now = time.monotonic()
                speed = steps * recipe.global_batch / max(now - since, 1e-9)
                tracker.metrics(means | {"train/learning_rate": rate, "speed/clips_per_second": speed}, self._shown_step())
                sums, since, last = {}, now, progress.step
                self._tell(means, measures)
            better = self._measure(held_out, tracker, measures)
            if kept := better or progress.step % recipe.checkpoint_every == 0:
                self._keep()
            if self.watch.gives_up(progress):
                done = 1.0
        if not kept:
            self._keep()
        if not measures or progress.step % recipe.validate_every or not self.watch.due(progress.step):
            self._measure(held_out, tracker, measures, last=True)
        self._require_moved()
        self.checkpoints.wait()  # nothing is released of which the last state is not kept
        self._tell({}, measures, finished=True)
        return measures

    def _name_clips(self, clips: ClipDataset, order: Order) -> None:
        """Say of which clips the batch consisted whose gradients were not finite, the first few times."""
        if self.workers.rank == 0 and self.progress.skipped <= NAMED:
            what = f"{self.stage.name}: a gradient of step {self.progress.step} was not finite, so it moved nothing"
            print(f"{what}; its clips: {listed(self._clips_at(self.progress.cursor, clips, order))}", file=sys.stderr)

    def _clips_at(self, cursor: int, clips: ClipDataset, order: Order) -> Sequence[str]:
        """The ids of the clips of the batch that begins there."""
        turns = order.take(cursor, self.recipe.global_batch)
        return clips.table.ids(np.unique(clips.numbers[[turn.clip for turn in turns]]))

    def _require_moved(self) -> None:
        """Refuse to release what no step of this call has trained although its turn came."""
        for part, steps in self.stuck.items():
            if steps and not self.moved[part]:
                raise UserError(
                    f"{self.stage.name}: none of the last {steps} steps moved {part!r}, whose gradients were not finite; nothing is "
                    f"released; lower --set recipes.{self.stage.name}.learning_rate ({self.recipe.learning_rate}) or use --precision fp32"
                )

    def _share_done(self) -> float:
        """Share of the recipe that is behind us, by steps or by time, the same on all workers.

        With `max_seconds` it asks all workers for the longest time, so it is called once per step: after it.
        """
        seconds = self.progress.seconds
        if self.recipe.max_seconds is not None and self.workers.world > 1:
            longest = torch.tensor(seconds, device=self.workers.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            seconds = float(longest)
        return self._share(seconds)

    def _share(self, seconds: float) -> float:
        """Share of the recipe done after the steps so far and `seconds` of training."""
        by_time = seconds / self.recipe.max_seconds if self.recipe.max_seconds is not None else 0.0
        return min(1.0, max(self.progress.step / self.recipe.steps, by_time))

    def _set_rate(self, done: float, epoch: int) -> float:
        """Give all optimisers the learning rate of the next step; returns it."""
        rate = self.recipe.rate_at(self.progress.step, done, epoch)
        for optimizer in self.state.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.progress.precision]
        return torch.autocast(self.workers.device.type, dtype, enabled=dtype is not None)

    def _measure_precision(self, micro_batches: list[dict[str, Any]]) -> None:
        """Settle it by the time that the gradients of a batch take; updates are the same in both, and are left out."""

        def gradients(precision: str) -> None:
            self.progress.precision = precision
            streams, weights = self._begin(micro_batches)
            while self._accumulate(streams, weights, {}) is not None:
                self._forget_gradients()

        device, world = self.workers.device, self.workers.world
        with untouched(self.stage, device), tensor_float32(device):
            seconds = measure(gradients, device, world)
        self.progress.precision = faster(seconds)
        if self.workers.rank == 0:
            times = " and ".join(f"{value:.3g} s in {name}" for name, value in seconds.items())
            print(f"{self.stage.name}: trains in {self.progress.precision}; gradients of a step take {times}", file=sys.stderr)

    def _step(self, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One update of every part, gradients accumulated over the micro-batches; returns mean logs, on the device.

        Parts go one after another, all micro-batches through one part before the next: a GAN's generator loss must see the
        critic already stepped, and the critic steps once it has the gradients of all micro-batches. So the generators that
        `losses` returns, one per micro-batch, advance in lockstep, and each part is stepped between two of their yields.
        """
        streams, weights = self._begin(micro_batches)
        logs: dict[str, Tensor] = {}
        while (part := self._accumulate(streams, weights, logs)) is not None:
            logs[f"grad_norm/{part}"] = self._update(part)
        if self.state.ema is not None:
            self.state.ema.update()
        return logs

    def _begin(self, micro_batches: list[dict[str, Any]]) -> tuple[list[Losses], list[float]]:
        """The losses of every micro-batch of a step, to be asked for, and its share of the batch."""
        self.stage.train()
        torch.manual_seed(hash((self.job.seed, self.progress.step, self.workers.rank)))  # dropout repeats on resume
        streams = []
        for batch in micro_batches:
            moved = {k: v.to(self.workers.device, non_blocking=True) for k, v in batch.items()}
            moved |= {"step_rng": step_rng(self.job.seed, self.progress.step), "step": self.progress.step}
            moved |= {"in_pieces": len(micro_batches) > 1}
            streams.append(self.stage.losses(moved))
        sizes = [len(next(iter(batch.values()))) for batch in micro_batches]
        return streams, [size / sum(sizes) for size in sizes]

    def _accumulate(self, streams: Sequence[Losses], weights: Sequence[float], logs: dict[str, Tensor]) -> str | None:
        """Gradients of the next part over all micro-batches; returns its name, or None after the last part."""
        part = None
        for i, (stream, weight) in enumerate(zip(streams, weights, strict=True)):
            with self._autocast():
                item = next(stream, None)
            if item is None:
                return None
            part, loss, terms = item
            if len(streams) > 1:  # workers exchange gradients once, with the last micro-batch
                self.state.parts[part].set_requires_gradient_sync(i == len(streams) - 1)  # type: ignore[operator]
            (loss * weight).backward()
            _add(logs, {f"{LOSS}{part}": loss, **terms}, weight)
        return part

    def _update(self, name: str) -> Tensor:
        """Clip and apply the gradients of one part; leaves the weights alone when they are not finite.

        What the loss left in other parts (a critic that judged) is thrown away: a loss moves its own part only.
        """
        parameters, optimizer = self.trained[name], self.state.optimizers[name]
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm if self.recipe.clip_norm else math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # The one read from the device per part and step: the host decides whether to step, so it waits for the backward pass and
        # launches nothing meanwhile. Without the wait the device itself would have to skip the step (`found_inf` of fused optimisers).
        if torch.isfinite(norm):
            optimizer.step()
            self.stuck[name], self.moved[name] = 0, True
        else:
            self.progress.skipped += 1
            self.stuck[name] += 1
            if self.stuck[name] >= PATIENCE:
                raise UserError(
                    f"{self.stage.name}: the gradients of {name!r} were not finite for {PATIENCE} steps in a row, "
                    f"up to step {self.progress.step}; "
                    f"lower --set recipes.{self.stage.name}.learning_rate (now {self.recipe.learning_rate}) or use --precision fp32"
                )
        self._forget_gradients()
        return norm.detach()

    def _forget_gradients(self) -> None:
        for optimizer in self.state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _mean(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean over the workers; the one place where logged values leave the device, all at once."""
        if not sums:
            return {}
        names = sorted(sums)
        packed = torch.stack([sums[name].to(self.workers.device) for name in names])
        if self.workers.world > 1:
            dist.all_reduce(packed)
            packed /= self.workers.world
        return dict(zip(names, packed.tolist(), strict=True))

    def _averaged(self) -> Any:
        """The weights that count: averaged ones where the recipe keeps an average."""
        return self.state.ema.swapped_in() if self.state.ema is not None else nullcontext()

    def _validate(self, clips: ClipDataset, tracker: Tracker) -> dict[str, float]:
        """Measures over held-out clips, and something to see and hear of the first batch."""
        self.stage.eval()
        self._share_statistics()
        examples = Examples(clips, self.stage, self.job.seed)
        batch_size = max(1, min(self.recipe.global_batch, len(clips)) // self.workers.world)
        sums: dict[str, Tensor] = {}
        count = 0
        with self._averaged(), self._autocast():
            for batch in validation_batches(examples, self.share, batch_size, self.job.validation_batches):
                moved = {k: v.to(self.workers.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                _add(sums, self.stage.validate(moved))  # first: FSDP wants a part called as a whole before a module inside it is
                if not count:
                    first = {k: v[:4] if isinstance(v, Tensor) else v for k, v in moved.items()}
                    self._listen(first, tracker)
                count += 1
        measures = {name: value / count for name, value in self._mean(sums).items()}
        tracker.metrics({f"val/{k}": v for k, v in measures.items()}, self._shown_step())
        return measures

    def _measure(self, held_out: ClipDataset, tracker: Tracker, measures: dict[str, float], last: bool = False) -> bool:
        """Put into `measures` what is due after this step, or everything; returns whether there is a new best to keep."""
        if last or self.progress.step % self.recipe.validate_every == 0:
            measures.update(self._validate(held_out, tracker))
        if not (last or self.watch.due(self.progress.step)):
            return False
        with self._averaged(), self._autocast():
            heard = self.watch.listen(self.stage)
        if heard:
            tracker.metrics({f"val/{name}": value for name, value in heard.items()}, self._shown_step())
        measures.update(heard)
        return self.watch.take(measures, self.progress)

    def recall(self, held_out: ClipDataset, measures: dict[str, float]) -> tuple[dict[str, float], dict[str, Any]]:
        """Go back to the best weights where these are to be released; the measures of what is released, and which weights it is."""
        step = self.watch.recall(self.progress, self.state, self.checkpoints)
        if step != self.progress.step:
            measures = self._validate(held_out, Tracker.off()) | {self.watch.name: self.progress.best.value}
        released = {"by": self.job.release, "step": step, "measure": self.watch.name, "value": measures.get(self.watch.name)}
        return measures, released

    def _shown_step(self) -> int:
        """The step in curves, which go on from phase to phase."""
        return self.job.steps_before + self.progress.step

    def _listen(self, batch: dict[str, Any], tracker: Tracker) -> None:
        rate = self.job.variant.audio.sample_rate
        for name, value in self.stage.listen(batch).items():
            kind, _, label = name.partition("/")
            array = value.detach().float().cpu().numpy()
            if kind == "audio":
                tracker.audio(label, array, rate, self._shown_step())
            else:
                tracker.spectrogram(label, array, self._shown_step())

    def _keep(self) -> None:
        """Begin a checkpoint."""
        self._share_statistics()
        self.checkpoints.save(self.state)

    def _share_statistics(self) -> None:
        """Average running statistics, so that all workers hold the same."""
        if self.workers.world > 1:
            for buffer in self.stage.buffers():
                if buffer.is_floating_point() and not isinstance(buffer, DTensor):
                    dist.all_reduce(buffer)
                    buffer /= self.workers.world

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """The weights to release, whole, on worker 0."""
        with self._averaged():
            return {name: full_weights(part, bool(self.job.lora)) for name, part in self.state.parts.items()}

    def _tell(self, means: Mapping[str, float], measures: Mapping[str, float], finished: bool = False) -> None:
        """Leave word for the driver's progress bar; on an object store, whose answers take a while, not at every turn."""
        now, run = time.monotonic(), Place.of(self.job.run)
        if self.workers.rank == 0 and (finished or run.local or now - self.told > TELL_EVERY):
            self.told = now
            state = {
                "step": self.progress.step,
                "seconds": self.progress.seconds,
                "share": 1.0 if finished else self._share(self.progress.seconds),
                "train": dict(means),
                "val": dict(measures),
            }
            with suppress(OSError):  # the next word will do; what must be kept is in the checkpoints
                (run / "progress.json").write_json(state)
