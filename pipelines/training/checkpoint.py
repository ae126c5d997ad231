"""Training state on disk: sharded weights, optimisers, averages, and where the data stream stood."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from stages.errors import UnreachableError, UserError
from stages.files import Place, digest

KEPT = 2  # checkpoints of a run
COMMIT = "COMMIT"
SETTLED = ("", "fp32", "bf16")  # precisions, as checkpoints number them
PLAIN = StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False)

T = TypeVar("T")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimiser steps taken or skipped
    cursor: int = 0  # clips consumed
    seconds: float = 0.0  # of training, over all restarts
    skipped: int = 0  # steps left out because a gradient was not finite
    precision: str = ""  # fp32 or bf16; "" before it is settled
    best: Best = field(default_factory=lambda: Best())


@dataclass
class Best:
    """The best validation measure so far; lower is better."""

    value: float = math.inf
    step: int = 0  # where it was measured; 0 for nowhere
    waited: int = 0  # measures since that were no better
    measure: int = 0  # which measure it is of: `measure_id`

    def take(self, value: float, step: int, measure: int) -> bool:
        """Take note of a measure; returns whether it is the best so far. That of another measure is forgotten."""
        if measure != self.measure:
            self.value, self.step, self.waited, self.measure = math.inf, 0, 0, measure
        if step == self.step:  # a run that was continued at its end measures once more
            return False
        if better := value < self.value:
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better


def measure_id(*what: str) -> int:
    """A number for a measure by its name and the weights of its judge."""
    return int(digest(what, 12), 16)


def local(tensor: Tensor) -> Tensor:
    """This worker's share of a parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Exponential moving average of trained parameters, sharded as they are.

    Decay min(decay, (1 + n) / (10 + n)) after n updates, the reference's warm-up (references.md#averaged-weights).
    Only parameters whose name (part first) begins with `averaged` have one.
    """

    def __init__(self, parts: Mapping[str, nn.Module], decay: float, averaged: str = "") -> None:
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.int64)
        trained = {f"{n}.{k}": p for n, part in parts.items() for k, p in part.named_parameters() if p.requires_grad}
        self.live = {name: p for name, p in trained.items() if name.startswith(averaged)}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights."""
        self.updates += 1
        n = int(self.updates)
        weight = 1.0 - min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_([local(a) for a in self.average.values()], [local(p.detach()) for p in self.live.values()], weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the live weights."""
        self.updates.zero_()
        for name, live in self.live.items():
            local(self.average[name]).copy_(local(live.detach()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parts carry the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.live.items():
            a, b = local(self.average[name]), local(live.detach())
            held = b.clone()
            b.copy_(a)
            a.copy_(held)


@dataclass
class TrainingState:
    """What a checkpoint holds: the sharded parts and their optimisers by name, the averages if any are kept, and the progress.

    With `trained_only` it holds of the parts what is trained: adapters, whose frozen base lies elsewhere.
    """

    parts: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    ema: EMA | None = None
    trained_only: bool = False
    progress: Progress = field(default_factory=Progress)

    def tensors(self) -> dict[str, Any]:
        """All of it as nested dicts of tensors, the weights and averages not copied."""
        progress = self.progress
        state: dict[str, Any] = {
            "parts": {
                name: get_model_state_dict(part, options=StateDictOptions(ignore_frozen_params=self.trained_only))
                for name, part in self.parts.items()
            },
            "optimizers": {name: get_optimizer_state_dict(self.parts[name], optimizer) for name, optimizer in self.optimizers.items()},
            "progress": {
                "counts": torch.tensor([progress.step, progress.cursor, progress.skipped]),
                "seconds": torch.tensor(progress.seconds, dtype=torch.float64),
                "precision": torch.tensor(SETTLED.index(progress.precision)),
            },
            "best": {
                "value": torch.tensor(progress.best.value, dtype=torch.float64),
                "counts": torch.tensor([progress.best.step, progress.best.waited, progress.best.measure]),
            },
        }
        if self.ema is not None:
            state["ema"] = {"average": self.ema.average, "updates": self.ema.updates}
        return state


class Checkpoints:
    """The checkpoints of a run, which all workers write and read together, in this process or on Ray, on any filesystem of `Place`.

    `step_00000010/` holds what every worker wrote, and COMMIT, which comes last and names the files with their sizes. What
    has no such file, or another size, is no checkpoint; of those that are, the newest ones stay, the best by the stage's measure,
    and one of every `keep_every` steps.

    Saving copies the state to the memory of the host and writes the copy in a thread while training goes on, one at a time.
    """

    def __init__(self, run: Place, rank: int, keep_every: int | None = None) -> None:
        self.run, self.rank, self.keep_every = run, rank, keep_every
        self._group = dist.new_group(backend="gloo")  # the writers' own: their messages must not meet those of the loop
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def whole(self) -> list[Place]:
        """Those that can be continued from, the newest first; the same on all workers."""
        return self._by_first(lambda: whole_checkpoints(self.run))

    def save(self, state: TrainingState) -> None:
        """Begin to write one, of the state as it is now, once the one before is whole; older ones go when this one is.

        Raises UserError when the one before could not be written, the disk being full: what was there before it stays.
        """
        self.wait()
        copy, best = cast(dict[str, Any], DefaultStager(PLAIN).stage(state.tensors())), state.progress.best.step
        self._under_way = self._writer.submit(self._write, f"step_{state.progress.step:08d}", copy, best)

    def wait(self) -> None:
        """Return when what `save` began is whole. Raises UserError when it cannot be written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Let the one under way come to its end, for better or worse: whoever wants to know asks `wait` before."""
        self._writer.shutdown()
        dist.destroy_process_group(self._group)

    def resume(self, state: TrainingState, folders: Sequence[Place]) -> None:
        """Restore `state` in place from the first of `folders` that can be read, also on another number of workers.

        Raises UserError when none can.
        """
        cause = ""
        for folder in folders:
            try:
                self._load(folder, state)
                return
            except (CheckpointException, OSError) as error:
                cause = _cause(error)
                warnings.warn(f"the checkpoint {folder} cannot be read ({cause}); going back to an older one", stacklevel=2)
        raise UserError(f"no checkpoint in {self.run} can be read ({cause}); if they are damaged for good, start over with --fresh")

    def _write(self, name: str, tensors: dict[str, Any], best: int) -> None:
        folder = self.run / name
        try:
            self._by_first(lambda: _discard(folder))
            # Without a cache of listings, in which what other workers write is missing.
            writer = FsspecWriter(folder.url, sync_files=folder.local, use_listings_cache=False)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            self._by_first(lambda: (folder / COMMIT).write_json(folder.list()))
            self._by_first(lambda: self._let_go(name, best))
        except (CheckpointException, OSError) as error:
            kept = ""
            with suppress(OSError):
                if self.rank == 0:
                    _discard(folder)  # the disk is not left full
                kept = max(_committed(self.run), default="")
            cure = "make room" if folder.local else "check it, its network and credentials"
            raise UserError(
                f"the checkpoint {name} cannot be written to {self.run} ({_cause(error)}); {kept or 'none before it'} is there: "
                f"{cure}, and run this again"
            ) from error

    def _let_go(self, newest: str, best: int) -> None:
        """Keep what is needed. What lies beyond the newest, from before a restart, could not be continued from: it is no newer one."""
        there = {step_of(name): name for name in _committed(self.run) if name <= newest}
        for step in superseded(there, best, self.keep_every):
            del there[step]
        for name in set(_names(self.run)) - set(there.values()):
            with suppress(OSError):
                _discard(self.run / name)

    def _load(self, folder: Place, state: TrainingState) -> None:
        tensors, reader = state.tensors(), FsspecReader(folder.url, use_listings_cache=False)
        held = self._by_first(lambda: sorted(reader.read_metadata().state_dict_metadata))
        averaged, measured = (any(name.startswith(group) for name in held) for group in ("ema.", "best."))
        if not averaged:
            tensors.pop("ema", None)
        if not measured:
            tensors.pop("best")
        if not any(name.startswith("progress.precision") for name in held):
            tensors["progress"].pop("precision")  # an older loa's
        dcp.load(tensors, storage_reader=reader, process_group=self._group)
        for name, part in state.parts.items():
            set_model_state_dict(part, tensors["parts"][name], options=StateDictOptions(strict=not state.trained_only))
            set_optimizer_state_dict(part, state.optimizers[name], tensors["optimizers"][name])
        step, cursor, skipped = tensors["progress"]["counts"].tolist()
        precision = SETTLED[int(tensors["progress"].get("precision", 0))]
        best = Best(float(tensors["best"]["value"]), *tensors["best"]["counts"].tolist()) if measured else Best()
        state.progress = Progress(step, cursor, float(tensors["progress"]["seconds"]), skipped, precision, best)
        if state.ema is not None and not averaged:
            state.ema.restart()  # the run kept no average until now

    def _by_first(self, work: Callable[[], T]) -> T:
        """What the first worker makes of `work`, on all of them. Raises UnreachableError on all of them if it fails."""
        answer: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                answer[0] = work()
            except Exception as error:  # of a filesystem or of unpickling a damaged file: all workers must hear of it
                answer[1] = _cause(error)
        dist.broadcast_object_list(answer, group=self._group)
        if answer[1]:
            raise UnreachableError(answer[1])
        return cast(T, answer[0])


def whole_checkpoints(run: Place) -> list[Place]:
    """The checkpoints of a run that can be continued from, the newest first; warns of the others."""
    faults = {name: _fault(run / name) for name in reversed(_names(run))}
    for name, fault in faults.items():
        if fault:
            warnings.warn(f"{run / name} is no whole checkpoint ({fault}); going on from one that is", stacklevel=3)
    return [run / name for name, fault in faults.items() if not fault]


def step_of(name: str) -> int:
    """The step that a checkpoint of this name is of."""
    return int(name.removeprefix("step_"))


def superseded(steps: Collection[int], best: int, keep_every: int | None = None) -> list[int]:
    """Of checkpoints at these steps, those that nobody needs: all but the newest `KEPT`, the best, and one of every `keep_every` steps."""
    return [step for step in sorted(steps)[:-KEPT] if step != best and not (keep_every and step % keep_every == 0)]


def _names(run: Place) -> list[str]:
    return [name for name in run.folders() if name.startswith("step_")]


def _committed(run: Place) -> list[str]:
    return [name for name in _names(run) if (run / name / COMMIT).exists()]


def _discard(folder: Place) -> None:
    (folder / COMMIT).remove()  # first: from now on it is no checkpoint
    folder.remove_tree()


def _fault(folder: Place) -> str:
    """What keeps a folder from being a checkpoint; "" for nothing. Raises UnreachableError."""
    try:
        sizes, there = json.loads((folder / COMMIT).read()), folder.list()
    except UnreachableError:
        raise
    except (OSError, ValueError):
        return f"it has no {COMMIT}"
    for name, size in sizes.items():
        if there.get(name) != size:
            return f"{name} has {there[name]} bytes instead of {size}" if name in there else f"{name} is missing"
    return ""


def _cause(error: BaseException) -> str:
    """The first worker's error in one line."""
    failures = getattr(error, "failures", {})
    inner = next(iter(failures.values()))[0] if failures else error
    if isinstance(inner, UnreachableError):
        return str(inner)  # it says which error it was
    return f"{type(inner).__name__}: {inner}".splitlines()[0]


def read_weights(folder: Place, parts: Mapping[str, nn.Module]) -> None:
    """Put the weights of a checkpoint into freshly built parts in this process: the averaged ones where it keeps an average.

    Raises UserError when it has others, or cannot be read.
    """
    reader = FsspecReader(folder.url, use_listings_cache=False)
    try:
        held = reader.read_metadata().state_dict_metadata
        for name, part in parts.items():
            state = part.state_dict()
            averages = {key: f"ema.average.{name}.{key}" for key in state}
            wanted = {averages[key] if averages[key] in held else f"parts.{name}.{key}": value for key, value in state.items()}
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read as weights of this stage ({_cause(error)})") from error


def full_weights(part: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """All weights of a part (or the trained ones) on the CPU of worker 0, {} elsewhere; every worker must call it.

    They are copies: what a single CPU worker gathers is the memory it trains in, which changes when averages are swapped out.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state: dict[str, Any] = get_model_state_dict(part, options=options)
    return {name: value.clone() for name, value in state.items()}
