"""What Ray Train runs on every worker.

Ray's controller imports this module as well, before every stage: it stays light, and what takes seconds to import
(PyTorch, transformers, diffusers) is left to the workers.
"""

from __future__ import annotations

import os
from typing import Any

REFUSED = "refused.txt"  # in the run's folder: what a worker could not go on with


class RayWorkers:
    """Ray Train's world."""

    def __init__(self) -> None:
        import psutil
        import ray.train
        import ray.train.torch

        # Checkpoints are written over gloo beside NCCL, too. Unasked it takes the address of the machine's name, often a loopback.
        address = ray.util.get_node_ip_address()
        for interface, addresses in psutil.net_if_addrs().items():
            if address in [one.address for one in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train the job in `config["job"]`, a cloudpickled TrainJob of this driver, with the CPUs and GPUs this worker was given.

    A UserError of one worker must end the others, who wait for it: it is left in the run's folder, and raised, so that Ray ends them
    all and starts them again; then all of them answer with it.
    """
    import torch
    from ray import cloudpickle

    from pipelines import cluster
    from pipelines.training.loop import train
    from pipelines.training.shared import require_seen
    from stages.errors import UserError
    from stages.files import Place

    job, workers = cloudpickle.loads(config["job"]), RayWorkers()
    if (refused := Place.of(job.run) / REFUSED).exists():
        return {"user_error": refused.read().decode()}
    require_seen(Place.of(job.run))
    try:
        threads, _ = cluster.given()
        torch.set_num_threads(threads)
        return {"measures": train(job, workers)}
    except UserError as error:
        if workers.world == 1:
            return {"user_error": str(error)}
        refused.write(str(error).encode())
        raise
