"""Where stages are trained, in this process or by workers on Ray, and how far each of them is."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from options import AS_NEEDED, Reservation, WorkerRange, in_this_process
from pipelines import cluster
from pipelines.training.identity import COMPLETE
from pipelines.training.shared import require_shared
from stages.errors import UserError
from stages.files import Place
from stages.remote import filesystem

if TYPE_CHECKING:
    from pipelines.training.dataset import ClipDataset
    from pipelines.training.job import TrainJob


class Crew:
    """Workers that train one stage after another: they start with the first one and are kept until the block ends.

    A start of Ray Train's workers takes many seconds, most of them imports, so stages that follow each other share it.

    Args:
        workers, reserve: how many and what each of them gets (`cluster.worker_group`); 0 is this process.
        max_failures: how often, in all, Ray starts the workers again after one of them died.
    """

    def __init__(self, workers: WorkerRange = None, reserve: Reservation = AS_NEEDED, max_failures: int = 3) -> None:
        self.workers, self.reserve, self.max_failures = workers, reserve, max_failures
        self._ray: _RayCrew | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ray is not None:
            self._ray.close(wait=kind is None or issubclass(kind, Exception))  # Ctrl-C waits for nobody
            self._ray = None

    def train(self, job: TrainJob, dataset: ClipDataset) -> None:
        """Prepare what the stage needs once, then train it to its end.

        Raises UserError with the sentence of the worker that could not go on.
        """
        from stages.base import stage_class

        cls = stage_class(job.stage)
        for earlier in cls.builds_on(job.variant):
            job.folder(earlier)  # refuses now, not on a worker
        prepared = Place.of(job.run) / "prepared"
        if not (prepared / COMPLETE).exists():
            prepared.remove_tree()  # what a killed command has left
            with prepared.writing_folder(last=[COMPLETE]) as folder:
                folder.mkdir(parents=True, exist_ok=True)
                cls.prepare(job.variant, job.folder, dataset, folder, job.start_folder())
                (folder / COMPLETE).touch()
        with _progress_bar(job):
            if in_this_process(self.workers):
                _train_here(job)
                return
            if self._ray is None:
                self._ray = _RayCrew(self.workers, self.reserve, self.max_failures, job)
            self._ray.train(job)


def _train_here(job: TrainJob) -> None:
    from pipelines.training.loop import train
    from pipelines.training.workers import OneProcess

    world = OneProcess()
    try:
        train(job, world)
    finally:
        world.close()


class _RayCrew:
    """Workers of one Ray Train run, which ask `Jobs` for what to train next.

    Ray Train waits in a thread, so that the thread of the command hears of Ctrl-C and of the end of each job.
    """

    def __init__(self, workers: WorkerRange, reserve: Reservation, max_failures: int, first: TrainJob) -> None:
        cluster.connect()
        pool = cluster.worker_group(workers, reserve)
        cluster.await_room(pool, f"training {first.stage}")
        require_shared(run := Place.of(first.run), pool)
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from pipelines.training.ray_worker import Jobs

        # Beside the driver, with which it ends anyway: a node that is taken away must not take the jobs with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._jobs = ray.remote(Jobs).options(num_cpus=0, scheduling_strategy=here).remote()
        self._error: BaseException | None = None
        trainer = _trainer(pool, run, max_failures, self._jobs)
        self._thread = threading.Thread(target=self._fit, args=(trainer,), name="ray-train", daemon=True)
        self._thread.start()

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # told by the thread that waits for the job
            self._error = error

    def train(self, job: TrainJob) -> None:
        """Have one job done. Raises what ended it."""
        import ray
        from ray import cloudpickle

        from pipelines.training.ray_worker import REFUSED

        refused = Place.of(job.run) / REFUSED
        refused.remove()
        number = ray.get(self._jobs.add.remote(cloudpickle.dumps(job)))  # opened by the workers alone
        answer = self._jobs.answer_to.remote(number)
        while not ray.wait([answer], timeout=0.5)[0]:
            if not self._thread.is_alive():
                if refused.exists():  # what one worker could not go on with, and no restart was left in which all would answer so
                    raise UserError(refused.read().decode()) from self._error
                raise self._error or RuntimeError(f"the workers ended before {job.stage} did")
        if (sentence := ray.get(answer)) is not None:
            raise UserError(sentence)

    def close(self, wait: bool = True) -> None:
        """Send the workers home."""
        import ray

        if ray.is_initialized():
            self._jobs.close.remote()
            if wait:
                self._thread.join()


def _trainer(pool: cluster.Pool, notes: Place, max_failures: int, jobs: Any) -> Any:
    """The Ray Train run of a crew; `notes` is a folder for what Ray keeps of it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from pipelines.training.ray_worker import ray_worker
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

    return Trainer(
        ray_worker,
        train_loop_config={"jobs": jobs},
        torch_config=OneMachine() if cluster.ends_with_us() else None,
        scaling_config=ScalingConfig(
            num_workers=pool.largest, use_gpu=pool.num_gpus > 0, resources_per_worker={k: v for k, v in pool.resources().items() if v}
        ),
        run_config=RunConfig(
            name="ray",
            **_storage(notes),  # for Ray's own notes: checkpoints are the workers' (`Checkpoints`)
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


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

        steps, phase = self.job.recipe.steps, self.job.phase
        title = f"{self.job.stage} {phase[0]}/{phase[1]}" if phase and phase[1] > 1 else self.job.stage
        interval = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=steps, desc=title, unit="step", mininterval=interval, file=sys.stderr, dynamic_ncols=True) as bar:
            for state in _reports(self.run):
                # A run that stops by the clock has its bar stretched to that end.
                share, step = float(state["share"]), int(state["step"])
                if step and share:
                    bar.total = max(step, round(step / share))
                bar.n = step
                named = {k.removeprefix("train/"): v for k, v in state["train"].items()}
                logs = {k: v for k, v in named.items() if "/" not in k and not k.startswith("critic_")}
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
