"""How the Ray Train workers of one machine find each other: through a file.

Ray's own way is PyTorch's TCP store, which listens on every address of the machine and asks nobody who they are.
"""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class FileBackend(_TorchBackend):
    """Ray's torch backend, with a file in a folder that only this user can open as its store."""

    _folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Start a process group over all workers."""
        self._folder = tempfile.mkdtemp(prefix="loa-rendezvous-")
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        settings = {
            "backend": backend_config.backend or ("nccl" if gpus else "gloo"),
            "world_size": len(worker_group),
            "init_method": f"file://{self._folder}/store",
            "timeout_s": backend_config.timeout_s,
        }
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **settings)
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """End the process group, then remove its file."""
        super().on_shutdown(worker_group, backend_config)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class OneMachine(TorchConfig):
    """`torch_config` of a TorchTrainer whose workers all run on this machine."""

    @property
    def backend_cls(self) -> type[FileBackend]:
        return FileBackend
