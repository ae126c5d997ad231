"""In which precision a stage trains: the one it needs, the one the user asked for, or the one that is measured to be faster.

A run keeps it: it is part of the checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from pipelines.training.job import PRECISIONS
from stages.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": None}  # of autocast; None for none
TIMED = 2  # steps in each precision, after one that warms up
WORTH = 100  # steps of a run from which on measuring pays
MARGIN = 0.9  # rounding has a price, so bf16 has to be faster by more than a clock's noise


def settled(asked: str, full: bool, kept: str, steps: int) -> str:
    """ "fp32" or "bf16", or "" where it has to be measured.

    Args:
        asked: one of PRECISIONS. "auto": measured, but fp32 for stages that need it; "fast": measured for all stages.
        full: whether the stage needs fp32 unless it is told otherwise.
        kept: what the run has trained in so far; "" at its beginning.
        steps: of the whole run.

    Raises UserError for an unknown precision.
    """
    if asked not in PRECISIONS:
        raise UserError(f"precision is {asked!r}; expected {', '.join(PRECISIONS)}")
    if asked in DTYPES:
        return asked
    if kept:
        return kept
    return "fp32" if (full and asked == "auto") or steps < WORTH else ""


def measure(step: Callable[[str], None], device: torch.device, world: int) -> dict[str, float]:
    """Seconds that a step takes in each precision: the quicker of TIMED ones, on the slowest worker; all workers get the same.

    `step(precision)` computes the gradients of one step, of the same batch every time. Where fp32 has no room on the GPU,
    going by what bf16 took, it is not tried and takes for ever.
    """
    seconds = dict.fromkeys(DTYPES, math.inf)
    held = _held(device)
    step("bf16")
    full = 0.0 if _has_room(device, held) else 1.0
    tried = ["bf16"] if any(_slowest([full], device, world)) else ["bf16", "fp32"]
    for name in tried[1:]:
        step(name)
    for name in TIMED * tried:  # in turns, so that what else the machine does meets both
        _await(device)
        began = time.monotonic()
        step(name)
        _await(device)
        seconds[name] = min(seconds[name], time.monotonic() - began)
    return dict(zip(seconds, _slowest(list(seconds.values()), device, world), strict=True))


def faster(seconds: Mapping[str, float]) -> str:
    """The precision to train in, by what `measure` found."""
    return "bf16" if seconds["bf16"] < MARGIN * seconds["fp32"] else "fp32"


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever runs within the block, buffers (running statistics, spectral norms) and random numbers are as before after it."""
    held = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(held[name])


@contextmanager
def tensor_float32(device: torch.device) -> Iterator[None]:
    """Within the block, GPUs may round the factors of fp32 matrix products to 10 bits of mantissa (TF32), as cuDNN's convolutions do."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _held(device: torch.device) -> int:
    """Bytes that a GPU holds; the count of the most that it held begins anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _has_room(device: torch.device, held: int) -> bool:
    """Whether a GPU that held so many bytes before a step in bf16 has room for one in fp32, whose activations are twice as large."""
    if device.type != "cuda":
        return True
    return held + 2 * (torch.cuda.max_memory_allocated(device) - held) < torch.cuda.mem_get_info(device)[1]


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(values: list[float], device: torch.device, world: int) -> list[float]:
    """The largest of every value over all workers."""
    packed = torch.tensor(values, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return [float(value) for value in packed.tolist()]
