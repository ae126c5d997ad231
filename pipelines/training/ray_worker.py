"""What Ray Train runs on every worker, and where the workers hear what to train.

Ray's controller imports this module as well, before every stage: it stays light, and what takes seconds to import
(PyTorch, transformers, diffusers) is left to the workers.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.training.job import TrainJob

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


class Jobs:
    """An actor beside the driver: the jobs of a crew in their order, and the answer to each of them.

    A job is a cloudpickled TrainJob of the driver, an answer None or the sentence of a worker that could not go on.
    """

    def __init__(self) -> None:
        self._jobs: list[bytes] = []
        self._answers: list[str | None] = []
        self._changed, self._open = asyncio.Condition(), True

    async def add(self, job: bytes) -> int:
        """Its number."""
        async with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        return len(self._jobs) - 1

    async def close(self) -> None:
        """No more of them."""
        async with self._changed:
            self._open = False
            self._changed.notify_all()

    async def unanswered(self) -> int:
        """The first number without an answer: where workers begin, the first time and after one of them died."""
        return len(self._answers)

    async def get(self, number: int) -> bytes | None:
        """The job of that number, once there is one; None after the last."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < len(self._jobs) or not self._open)
        return self._jobs[number] if number < len(self._jobs) else None

    async def answer(self, sentence: str | None) -> None:
        """To the first unanswered job."""
        async with self._changed:
            self._answers.append(sentence)
            self._changed.notify_all()

    async def answer_to(self, number: int) -> str | None:
        """Once there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < len(self._answers))
        return self._answers[number]


def ray_worker(config: dict[str, Any]) -> None:
    """Train what the `Jobs` in `config["jobs"]` hold, one after another, with the CPUs and GPUs this worker was given.

    A UserError of one worker must end the others, who wait for it: it is left in the run's folder, and raised, so that Ray ends them
    all and starts them again; then they answer with it.
    """
    import ray
    from ray import cloudpickle

    jobs, workers = config["jobs"], RayWorkers()
    number = ray.get(jobs.unanswered.remote())
    while (job := ray.get(jobs.get.remote(number))) is not None:
        sentence = _train(cloudpickle.loads(job), workers)
        if workers.rank == 0:
            ray.get(jobs.answer.remote(sentence))
        number += 1


def _train(job: TrainJob, workers: RayWorkers) -> str | None:
    """Train one job; returns the sentence on why that cannot be done, or None."""
    import torch

    from pipelines import cluster
    from pipelines.training.loop import train
    from pipelines.training.shared import require_seen
    from stages.errors import UserError
    from stages.files import Place

    refused = Place.of(job.run) / REFUSED
    if refused.exists():
        return refused.read().decode()
    require_seen(Place.of(job.run))
    try:
        threads, _ = cluster.given()
        torch.set_num_threads(threads)
        train(job, workers)
    except UserError as error:
        if workers.world == 1:
            return str(error)
        refused.write(str(error).encode())
        raise
    return None
