"""In which precision an encoder computes: chosen when a series begins, part of its recipe, the same on every later device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from stages.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """The kind of device that a worker computes on."""

    kind: str  # "cpu" or "cuda"
    name: str  # as its maker calls it
    bf16: bool  # computes bf16 itself; T4 and V100 only emulate it

    @classmethod
    def here(cls, gpu: bool = True) -> Device:
        """The device of this process: its GPU, where it has one and may use it."""
        if not gpu or not torch.cuda.is_available():
            return cls("cpu", torch.backends.cpu.get_cpu_capability(), True)
        return cls("cuda", torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False))

    def __str__(self) -> str:
        return f"{self.kind} ({self.name})"


def choose(device: Device, fp16: bool) -> str:
    """The precision of a new series begun on `device`; `fp16` says that the encoder's values hold in it."""
    if device.kind == "cpu":
        return "fp32"
    return "bf16" if device.bf16 else "fp16" if fp16 else "fp32"


def require(precision: str, device: torch.device, name: str) -> None:
    """Make ready for a precision. Raises UserError on a GPU that could only emulate it."""
    if device.type != "cuda":
        return
    here = Device.here()
    if precision == "bf16" and not here.bf16:
        raise UserError(
            f"the series of the {name} pass are made in bf16, which {here.name} only emulates, slowly; continue them on a GPU with "
            "bf16 (Ampere or later) or on CPUs, or begin a new store with --precision fp32"
        )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 keeps its 24 bits on every device


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Automatic casting to `precision`; nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, _DTYPES[precision])
