"""Training state on disk: sharded weights, optimisers, averages, and where the data stream stood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor


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
    """What a checkpoint holds: the sharded parts and their optimisers by name, the averages if any are kept, and the progress."""

    parts: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    ema: EMA | None = None
    progress: Progress = field(default_factory=Progress)

    def tensors(self) -> dict[str, Any]:
        """All of it as nested dicts of tensors, the weights and averages not copied."""
        progress = self.progress
        state: dict[str, Any] = {
            "parts": {name: get_model_state_dict(part) for name, part in self.parts.items()},
            "optimizers": {name: get_optimizer_state_dict(self.parts[name], optimizer) for name, optimizer in self.optimizers.items()},
            "progress": {
                "counts": torch.tensor([progress.step, progress.cursor, progress.skipped]),
                "seconds": torch.tensor(progress.seconds, dtype=torch.float64),
            },
        }
        if self.ema is not None:
            state["ema"] = {"average": self.ema.average, "updates": self.ema.updates}
        return state


def save(folder: Path, state: TrainingState) -> None:
    """Write a sharded checkpoint (every worker calls this with its own or a common folder)."""
    dcp.save(state.tensors(), checkpoint_id=folder)


def load(folder: Path, state: TrainingState) -> None:
    """Restore `state` in place, also on another number of workers."""
    tensors = state.tensors()
    dcp.load(tensors, checkpoint_id=folder)
    for name, part in state.parts.items():
        set_model_state_dict(part, tensors["parts"][name])
        set_optimizer_state_dict(part, state.optimizers[name], tensors["optimizers"][name])
    step, cursor, skipped = tensors["progress"]["counts"].tolist()
    state.progress = Progress(step, cursor, float(tensors["progress"]["seconds"]), skipped)


def full_weights(part: nn.Module) -> dict[str, Tensor]:
    """All weights of a part on the CPU of worker 0, {} elsewhere; every worker must call it.

    They are copies: what a single CPU worker gathers is the memory it trains in, which changes when averages are swapped out.
    """
    state: dict[str, Any] = get_model_state_dict(part, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.clone() for name, value in state.items()}
