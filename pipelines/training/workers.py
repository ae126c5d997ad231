"""The workers of a training as the loop sees them, and how the weights of a stage are spread over them."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import local_ray
from stages.base import Stage

SHARD_FROM = 1_000_000  # parameters; smaller blocks are gathered together with their part, one message instead of many


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
