"""The loop every worker runs, for every stage: read, step, average, validate, checkpoint, resume, report."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import local_ray
from pipelines.features.store import FeatureStore
from pipelines.tracking import Tracker
from pipelines.training.checkpoint import EMA, Checkpoints, TrainingState, full_weights
from pipelines.training.dataset import ClipDataset, Examples, Share, step_rng, training_batches, validation_batches
from pipelines.training.job import PRECISIONS, TrainJob
from pipelines.training.order import Order
from stages.base import Stage, release, stage_class
from stages.config import Recipe, to_dict
from stages.errors import UserError
from stages.files import write_json
from stages.lora import attach, save_adapters
from stages.starting import start_from

AT_START = "at_start.json"  # what the given weights of a run measured before its first step
LOG_EVERY = 10  # steps
SHARD_FROM = 1_000_000  # parameters; smaller blocks are gathered together with their part, one message instead of many
NAMED = 5  # steps left out whose clips are named
PATIENCE = 20  # steps in a row without finite gradients before the run is given up


Losses = Iterator[tuple[str, Tensor, dict[str, Tensor]]]  # what `Stage.losses` returns: part, loss, logs


class Workers(Protocol):
    """The world a worker lives in: Ray Train's, or one plain process."""

    rank: int
    world: int
    device: torch.device


class OneProcess:
    """No Ray."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._store: str | None = None
        self._excepthook = sys.excepthook  # torch.distributed puts one of its own before it
        if not dist.is_initialized():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", local_ray.LOOPBACK)  # one process has nobody to listen to
            self._store = tempfile.mktemp(prefix="loa-rendezvous-")
            dist.init_process_group("gloo", init_method=f"file://{self._store}", rank=0, world_size=1)

    def close(self) -> None:
        """End the process group this object began."""
        if self._store is not None:
            dist.destroy_process_group()
            Path(self._store).unlink(missing_ok=True)
            sys.excepthook = self._excepthook


def autocast_dtype(device: torch.device, precision: str, full: bool = False) -> torch.dtype | None:
    """bfloat16, or None for float32. "auto": where the device is fast at it, but not for stages of `full` precision; "fast": also there.

    CPUs: only with AMX tiles. With AVX512-BF16 alone a T-UNet step took twice as long as in float32 (docs/log.md).
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported()
    chosen = {"bf16": True, "fp32": False, "fast": fast, "auto": fast and not full}[precision]
    return torch.bfloat16 if chosen else None


def shard(stage: Stage, mesh: DeviceMesh) -> dict[str, nn.Module]:
    """FSDP2: large repeated blocks one by one, innermost first, then each part."""
    # Outputs that are views would lose their hook if someone wrote into them; nobody here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    parts = stage.parts()
    for part in parts.values():
        for module in reversed(list(part.modules())):
            large = isinstance(module, stage.blocks) and sum(p.numel() for p in module.parameters()) >= SHARD_FROM
            if module is not part and (large or isinstance(module, stage.entries)):
                fully_shard(module, mesh=mesh)
        # FSDP2 takes no scalars; they stay whole everywhere, which only frozen ones may.
        scalars = {p for p in part.parameters() if p.ndim == 0}
        assert not any(p.requires_grad for p in scalars), f"{stage.name} trains a scalar parameter; give it one dimension"
        fully_shard(part, mesh=mesh, ignored_params=scalars)
    return parts


def train(job: TrainJob, workers: Workers) -> dict[str, float]:
    """Train one stage to the end of its recipe and release its weights; returns the last validation measures.

    Called by every worker. A run that finds a checkpoint continues from it.
    """
    recipe, device = job.recipe, workers.device
    cls = stage_class(job.stage)
    series = cls.reads(job.variant)
    store = FeatureStore.open(job.store)
    clips = ClipDataset(store, cls, series, "train", job.corpora, job.turns)
    held_out = ClipDataset(store, cls, series, "validation", job.corpora)
    if not len(held_out):
        held_out = clips

    torch.manual_seed(job.seed)  # equal first weights on every worker
    checkpoints = Checkpoints(Path(job.run), workers.rank)
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
        weights = run.gather()
        if workers.rank == 0:
            fresh = cls.build(job.variant, job.folder)
            if job.lora:
                attach(fresh, job.lora)
            for name, part in fresh.parts().items():
                part.load_state_dict(weights[name], strict=not job.lora)
            progress = state.progress
            card = {
                "variant": job.variant.name,
                "config": to_dict(job.variant),
                "steps": progress.step,
                "clips": progress.cursor,
                "seconds": round(progress.seconds, 1),
                "skipped_steps": progress.skipped,
                "precision": "fp32" if run.dtype is None else "bf16",
                "validation": measures,
                **_at_start(Path(job.run)),
                **job.card,
            }
            release(fresh.eval(), job.output, card, save_adapters if job.lora else None)
    return measures


def _at_start(run: Path) -> dict[str, Any]:
    """What the given weights of a run measured, for its card; nothing where it began with fresh ones."""
    path = run / AT_START
    return {"validation_at_start": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


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
        self.dtype = autocast_dtype(workers.device, job.precision, stage.full_precision)
        self.trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in state.parts.items()}
        self.stuck = dict.fromkeys(
            self.trained, 0
        )  # steps in a row without finite gradients, by part: a critic goes on without its generator
        self.moved = dict.fromkeys(self.trained, False)  # whether any step of this call moved the part

    def fit(self, clips: ClipDataset, held_out: ClipDataset, tracker: Tracker) -> dict[str, float]:
        """Step until the recipe is fulfilled, with everything that happens on the way."""
        recipe, progress = self.recipe, self.progress
        examples, order = Examples(clips, self.stage, self.job.seed), clips.order(self.job.seed)
        batches = training_batches(examples, order, recipe, self.share, replace(progress), self.job.loader_workers)
        measures: dict[str, float] = {}
        if self.job.start and not progress.step:
            at_start = self._validate(held_out, tracker)
            if self.workers.rank == 0:
                write_json(Path(self.job.run) / AT_START, at_start)
        sums: dict[str, Tensor] = {}
        before, clock = progress.seconds, time.monotonic()
        since, last = clock, progress.step
        done = self._share_done()
        while done < 1.0:
            rate = self._set_rate(done, progress.cursor // order.length)
            left_out = progress.skipped
            _add(sums, self._step(next(batches)))
            if progress.skipped > left_out:
                self._name_clips(clips, order)
            progress.step += 1
            progress.cursor += recipe.global_batch
            progress.seconds = before + time.monotonic() - clock
            done = self._share_done()
            if progress.step % LOG_EVERY == 0 or done >= 1.0:
                steps = progress.step - last
                means = {f"train/{k}": v / steps for k, v in self._mean(sums).items()}  # waits for the device, so before the clock
                now = time.monotonic()
                speed = steps * recipe.global_batch / max(now - since, 1e-9)
                tracker.metrics(means | {"train/learning_rate": rate, "speed/clips_per_second": speed}, progress.step)
                sums, since, last = {}, now, progress.step
                self._tell(means, measures)
            if progress.step % recipe.validate_every == 0:
                measures = self._validate(held_out, tracker)
            if progress.step % recipe.checkpoint_every == 0:
                self._keep()
        if progress.step % recipe.validate_every or not measures:
            measures = self._validate(held_out, tracker)
        if progress.step % recipe.checkpoint_every:
            self._keep()
        self._require_moved()
        self._tell({}, measures, finished=True)
        return measures

    def _name_clips(self, clips: ClipDataset, order: Order) -> None:
        """Say of which clips the batch consisted whose gradients were not finite, the first few times."""
        if self.workers.rank == 0 and self.progress.skipped <= NAMED:
            turns = order.take(self.progress.cursor, self.recipe.global_batch)
            ids = clips.table.ids(np.unique(clips.numbers[[turn.clip for turn in turns]]))
            what = f"{self.stage.name}: a gradient of step {self.progress.step} was not finite, so it moved nothing"
            print(f"{what}; its clips: {', '.join(ids)}", file=sys.stderr)

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
        return torch.autocast(self.workers.device.type, self.dtype, enabled=self.dtype is not None)

    def _step(self, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One update of every part, gradients accumulated over the micro-batches; returns mean logs, on the device.

        Parts go one after another, all micro-batches through one part before the next: a GAN's generator loss must see the
        critic already stepped, and the critic steps once it has the gradients of all micro-batches. So the generators that
        `losses` returns, one per micro-batch, advance in lockstep, and each part is stepped between two of their yields.
        """
        self.stage.train()
        torch.manual_seed(hash((self.job.seed, self.progress.step, self.workers.rank)))  # dropout repeats on resume
        streams = []
        for batch in micro_batches:
            moved = {k: v.to(self.workers.device, non_blocking=True) for k, v in batch.items()}
            moved |= {"step_rng": step_rng(self.job.seed, self.progress.step), "step": self.progress.step}
            streams.append(self.stage.losses(moved))
        sizes = [len(next(iter(batch.values()))) for batch in micro_batches]
        weights = [size / sum(sizes) for size in sizes]
        logs: dict[str, Tensor] = {}
        while (part := self._accumulate(streams, weights, logs)) is not None:
            logs[f"grad_norm/{part}"] = self._update(part)
        if self.state.ema is not None:
            self.state.ema.update()
        return logs

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
            _add(logs, terms, weight)
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
        for other in self.state.optimizers.values():
            other.zero_grad(set_to_none=True)
        return norm.detach()

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
        tracker.metrics({f"val/{k}": v for k, v in measures.items()}, self.progress.step)
        return measures

    def _listen(self, batch: dict[str, Any], tracker: Tracker) -> None:
        rate = self.job.variant.audio.sample_rate
        for name, value in self.stage.listen(batch).items():
            kind, _, label = name.partition("/")
            array = value.detach().float().cpu().numpy()
            if kind == "audio":
                tracker.audio(label, array, rate, self.progress.step)
            else:
                tracker.spectrogram(label, array, self.progress.step)

    def _keep(self) -> None:
        """Checkpoint; running statistics are averaged first, so that all workers hold the same."""
        if self.workers.world > 1:
            for buffer in self.stage.buffers():
                if buffer.is_floating_point() and not isinstance(buffer, DTensor):
                    dist.all_reduce(buffer)
                    buffer /= self.workers.world
        self.checkpoints.save(self.state)

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """The weights to release, whole, on worker 0."""
        with self._averaged():
            return {name: full_weights(part, bool(self.job.lora)) for name, part in self.state.parts.items()}

    def _tell(self, means: Mapping[str, float], measures: Mapping[str, float], finished: bool = False) -> None:
        """Leave word for the driver's progress bar."""
        if self.workers.rank == 0:
            state = {
                "step": self.progress.step,
                "seconds": self.progress.seconds,
                "share": 1.0 if finished else self._share(self.progress.seconds),
                "train": dict(means),
                "val": dict(measures),
            }
            write_json(Path(self.job.run) / "progress.json", state)
