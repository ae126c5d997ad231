"""Start a training, in this process or on Ray, and show how far it is."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from options import Reservation, WorkerRange, in_this_process
from pipelines import cluster
from pipelines.training.identity import COMPLETE
from pipelines.training.shared import require_shared
from stages.errors import UserError
from stages.files import Place
from stages.remote import filesystem

if TYPE_CHECKING:
    from pipelines.training.dataset import ClipDataset
    from pipelines.training.job import TrainJob
    from stages.base import Stage


def fit(job: TrainJob, cls: type[Stage], dataset: ClipDataset, workers: WorkerRange, reserve: Reservation, max_failures: int) -> None:
    """Prepare what the stage needs once, then train it in this process or on Ray."""
    for earlier in cls.builds_on(job.variant):
        job.folder(earlier)  # refuses now, not on a worker
    prepared = Place.of(job.run) / "prepared"
    if not (prepared / COMPLETE).exists():
        with prepared.writing_folder(last=[COMPLETE]) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            cls.prepare(job.variant, job.folder, dataset, folder, job.start_folder())
            (folder / COMPLETE).touch()
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
    run = Place.of(job.run)
    require_shared(run, pool)
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
            **_storage(run),  # for Ray's own notes: checkpoints are the workers' (`Checkpoints`)
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    (run / REFUSED).remove()
    result = trainer.fit()
    answer = result.return_value
    if isinstance(answer, dict) and "user_error" in answer:
        raise UserError(answer["user_error"])


def _storage(run: Place) -> dict[str, Any]:
    """A run's folder in the words of Ray, with the filesystem that loa itself uses: Ray's own S3 takes other credentials."""
    if run.local:
        return {"storage_path": run.url}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(run.url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


class _progress_bar:
    """A bar over the run's steps, fed by what its first worker leaves in the run folder."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.run, self.stop = job, Place.of(job.run), threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._show, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _show(self) -> None:
        from tqdm import tqdm

        steps = self.job.recipe.steps
        interval = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=steps, desc=self.job.stage, unit="step", mininterval=interval, file=sys.stderr, dynamic_ncols=True) as bar:
            for state in _reports(self.run):
                # A run that stops by the clock has its bar stretched to that end.
                share, step = float(state["share"]), int(state["step"])
                if step and share:
                    bar.total = max(step, round(step / share))
                bar.n = step
                logs = {k.removeprefix("train/"): v for k, v in state["train"].items() if "grad_norm" not in k and "rate" not in k}
                if logs:
                    bar.set_postfix({k: f"{v:.3g}" for k, v in list(logs.items())[:4]}, refresh=False)
                bar.update(0)
                if self.stop.wait(0.5 if self.run.local else 5.0):
                    bar.refresh()
                    return


def _reports(run: Place) -> Iterator[dict[str, Any]]:
    """Progress of a run as its first worker last reported it; ends when the caller stops asking."""
    while True:
        try:
            yield json.loads((run / "progress.json").read())
        except (OSError, json.JSONDecodeError):
            yield {"step": 0, "share": 0.0, "train": {}, "val": {}}
