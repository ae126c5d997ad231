"""Training state on disk: sharded weights, optimisers, averages, and where the data stream stood."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from stages.errors import UserError

KEPT = 2  # checkpoints of a run
COMMIT = "COMMIT"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimiser steps taken or skipped
    cursor: int = 0  # clips consumed
    seconds: float = 0.0  # of training, over all restarts
    skipped: int = 0  # steps left out because a gradient was not finite


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
            },
        }
        if self.ema is not None:
            state["ema"] = {"average": self.ema.average, "updates": self.ema.updates}
        return state


class Checkpoints:
    """The checkpoints of a run, which all workers write and read together, in this process or on Ray.

    `step_00000010/` holds what every worker wrote, and COMMIT, which comes last and names the files with their sizes. What
    has no such file, or another size, is no checkpoint; of those that are, the newest ones stay.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self.rank = Path(run), rank

    def whole(self) -> list[Path]:
        """Those that can be continued from, the newest first; the same on all workers."""
        found: list[Any] = [None]
        if self.rank == 0:
            folders = sorted(self.run.glob("step_*"), reverse=True)
            faults = {folder: _fault(folder) for folder in folders}
            for folder, fault in faults.items():
                if fault:
                    warnings.warn(f"{folder} is no whole checkpoint ({fault}) and is left alone", stacklevel=2)
            found = [[str(folder) for folder in folders if not faults[folder]]]
        dist.broadcast_object_list(found)
        return [Path(folder) for folder in found[0]]

    def save(self, state: TrainingState) -> None:
        """Write one and let older ones go.

        Raises UserError when it cannot be written, the disk being full: what was there before stays.
        """
        name = f"step_{state.progress.step:08d}"
        draft = self.run / f".{name}"
        if self.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        dist.barrier()
        try:
            dcp.save(state.tensors(), checkpoint_id=draft)
            if self.rank == 0:
                self._commit(draft, name)
        except (CheckpointException, OSError) as error:
            if self.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)  # the disk is not left full
            kept = max((path.name for path in self.run.glob("step_*")), default="none before it")
            raise UserError(
                f"the checkpoint {name} cannot be written to {self.run} ({_cause(error)}); {kept} is there: make room, and run this again"
            ) from error
        dist.barrier()

    def _commit(self, draft: Path, name: str) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        with open(draft / COMMIT, "w", encoding="utf-8") as file:
            json.dump(sizes, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.run / name, ignore_errors=True)
        os.replace(draft, self.run / name)
        for old in sorted(self.run.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self, state: TrainingState, folders: Sequence[Path]) -> None:
        """Restore `state` in place from the first of `folders` that can be read, also on another number of workers.

        Raises UserError when none can.
        """
        for folder in folders:
            try:
                _load(folder, state)
                return
            except CheckpointException as error:
                warnings.warn(f"the checkpoint {folder} cannot be read ({_cause(error)}); going back to an older one", stacklevel=2)
        raise UserError(f"no checkpoint in {self.run} can be read; start over with --fresh")


def _fault(folder: Path) -> str:
    """What keeps a folder from being a checkpoint; "" for nothing."""
    try:
        sizes = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {COMMIT}"
    for name, size in sizes.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            return f"{name} has {there} bytes instead of {size}" if there is not None else f"{name} is missing"
    return ""


def _cause(error: BaseException) -> str:
    """The first worker's error in one line."""
    failures = getattr(error, "failures", {})
    inner = next(iter(failures.values()))[0] if failures else error
    return f"{type(inner).__name__}: {inner}".splitlines()[0]


def _load(folder: Path, state: TrainingState) -> None:
    tensors = state.tensors()
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    averaged = any(name.startswith("ema.") for name in held)
    if not averaged:
        tensors.pop("ema", None)
    dcp.load(tensors, checkpoint_id=folder)
    for name, part in state.parts.items():
        set_model_state_dict(part, tensors["parts"][name], options=StateDictOptions(strict=not state.trained_only))
        set_optimizer_state_dict(part, state.optimizers[name], tensors["optimizers"][name])
    step, cursor, skipped = tensors["progress"]["counts"].tolist()
    state.progress = Progress(step, cursor, float(tensors["progress"]["seconds"]), skipped)
    if state.ema is not None and not averaged:
        state.ema.restart()  # the run kept no average until now


def full_weights(part: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """All weights of a part (or the trained ones) on the CPU of worker 0, {} elsewhere; every worker must call it.

    They are copies: what a single CPU worker gathers is the memory it trains in, which changes when averages are swapped out.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state: dict[str, Any] = get_model_state_dict(part, options=options)
    return {name: value.clone() for name, value in state.items()}
