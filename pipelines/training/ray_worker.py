"""What Ray Train runs on every worker.

Ray's controller imports this module as well, before every stage: it stays light, and what takes seconds to import
(PyTorch, transformers, diffusers) is left to the workers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RayWorkers:
    """Ray Train's world: checkpoints go to the run's storage and come back after failures, on any number of workers."""

    def __init__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def latest(self) -> Path | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        return Path(checkpoint.to_directory()) if checkpoint else None

    def keep(self, write: Callable[[Path], None], step: int) -> None:
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step_{step:08d}")


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train the job in `config["job"]`, a cloudpickled TrainJob of this driver, with the CPUs and GPUs this worker was given."""
    import torch
    from ray import cloudpickle

    from pipelines import cluster
    from pipelines.training.loop import train
    from stages.errors import UserError

    try:
        threads, _ = cluster.given()
        torch.set_num_threads(threads)
        return {"measures": train(cloudpickle.loads(config["job"]), RayWorkers())}
    except UserError as error:  # the same everywhere and every time: restarting would only repeat it
        return {"user_error": str(error)}
