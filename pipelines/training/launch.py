"""Start a training, in this process or on Ray, and show how far it is."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options import Reservation, WorkerRange, in_this_process
from pipelines import cluster
from stages.errors import UserError
from stages.files import whole_folder

if TYPE_CHECKING:
    from pipelines.training.dataset import ClipDataset
    from pipelines.training.job import TrainJob
    from stages.base import Stage


def fit(job: TrainJob, cls: type[Stage], dataset: ClipDataset, workers: WorkerRange, reserve: Reservation, max_failures: int) -> None:
    """Prepare what the stage needs once, then train it in this process or on Ray."""
    for earlier in cls.builds_on(job.variant):
        job.folder(earlier)  # refuses now, not on a worker
    prepared = Path(job.run) / "prepared"
    if not prepared.is_dir():
        with whole_folder(prepared) as folder:
            cls.prepare(job.variant, job.folder, dataset, folder, job.start_folder())
    with _progress_bar(job):
        if in_this_process(workers):
            _fit_here(job)
        else:
            _fit_on_ray(job, workers, reserve, max_failures)


def _fit_here(job: TrainJob) -> None:
    from pipelines.training.loop import OneProcess, train

    world = OneProcess()
    try:
        train(job, world)
    finally:
        world.close()


def _fit_on_ray(job: TrainJob, workers: WorkerRange, reserve: Reservation, max_failures: int) -> None:
    cluster.connect()
    pool = cluster.worker_group(workers, reserve)
    cluster.await_room(pool, f"training {job.stage}")
    from ray import cloudpickle
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from pipelines.training.ray_worker import REFUSED, ray_worker
    from pipelines.training.rendezvous import OneMachine

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Ray's, on a cluster of our own without the one that frees the workers' resources should the controller die.

            It asks the cluster that `ray start` ran last, which is not ours: if that one is gone it waits for it, 12 idle
            seconds at the end of every training (Ray 2.60), and our cluster dies with us anyway.
            """
            callbacks: list[Any] = super()._create_default_callbacks()
            return [c for c in callbacks if not (cluster.ends_with_us() and type(c).__name__ == "PlacementGroupCleanerCallback")]

        def _register_sigint_handler(self, controller: Any) -> None:
            """Not Ray's, after which the driver leaves without a word; Ctrl-C is an exception here, as everywhere in loa.

            The controller and its workers belong to this driver and end with it.
            """

    trainer = Trainer(
        ray_worker,
        train_loop_config={"job": cloudpickle.dumps(job)},  # opened by the workers alone
        torch_config=OneMachine() if cluster.ends_with_us() else None,
        scaling_config=ScalingConfig(
            num_workers=pool.largest, use_gpu=pool.num_gpus > 0, resources_per_worker={k: v for k, v in pool.resources().items() if v}
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=job.run,  # for Ray's own notes: checkpoints are the workers' (`Checkpoints`)
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    (Path(job.run) / REFUSED).unlink(missing_ok=True)
    result = trainer.fit()
    answer = result.return_value
    if isinstance(answer, dict) and "user_error" in answer:
        raise UserError(answer["user_error"])


class _progress_bar:
    """A bar over the run's steps, fed by what its first worker leaves in the run folder."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.stop = job, threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._show, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _show(self) -> None:
        from tqdm import tqdm

        steps, phase = self.job.recipe.steps, self.job.phase
        title = f"{self.job.stage} {phase[0]}/{phase[1]}" if phase and phase[1] > 1 else self.job.stage
        interval = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=steps, desc=title, unit="step", mininterval=interval, file=sys.stderr, dynamic_ncols=True) as bar:
            for state in _reports(self.job):
                # A run that stops by the clock has its bar stretched to that end.
                share, step = float(state["share"]), int(state["step"])
                if step and share:
                    bar.total = max(step, round(step / share))
                bar.n = step
                logs = {k.removeprefix("train/"): v for k, v in state["train"].items() if "grad_norm" not in k and "rate" not in k}
                if logs:
                    bar.set_postfix({k: f"{v:.3g}" for k, v in list(logs.items())[:4]}, refresh=False)
                bar.update(0)
                if self.stop.wait(0.5):
                    bar.refresh()
                    return


def _reports(job: TrainJob) -> Iterator[dict[str, Any]]:
    """Progress of a job as its first worker last reported it; ends when the caller stops asking."""
    path = Path(job.run) / "progress.json"
    while True:
        try:
            yield json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            yield {"step": 0, "share": 0.0, "train": {}, "val": {}}
