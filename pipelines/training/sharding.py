"""How the weights of a stage are spread over its workers."""

from __future__ import annotations

import warnings

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from stages.base import Stage

SHARD_FROM = 1_000_000  # parameters; smaller blocks are gathered together with their part, one message instead of many


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
