"""How long recordings are, from their headers alone. Runs on Ray Data's workers, so it lives apart from the job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from options import AS_NEEDED, Reservation, WorkerRange, in_this_process
from pipelines.corpora.files import MISSING
from stages.audio import probe
from stages.errors import AudioError

# Fewer headers than this are read sooner than a Ray cluster starts.
FEW = 4096
_BLOCK = 256  # headers per task


def probe_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The column `path` with `seconds` (0 where unknown) and `problem` ("" where there is none). Never raises."""
    headers = [probe_header(path) for path in batch["path"]]
    seconds, problems = zip(*headers, strict=True)
    return {"path": batch["path"], "seconds": np.array(seconds), "problem": np.array(problems, dtype=object)}


def probe_header(path: str) -> tuple[float, str]:
    """(seconds, "") of a recording, or (0, the reason why it cannot be used)."""
    if not os.path.isfile(path):  # also a pipe or a device, which would be waited for without end
        return 0.0, "unreadable: it is no regular file" if os.path.exists(path) else MISSING
    try:
        if os.path.getsize(path) == 0:
            return 0.0, "empty: the file has no bytes"
        return probe(path).seconds, ""
    except AudioError as error:
        kind = "empty" if "is empty" in str(error) else "unreadable"
        return 0.0, f"{kind}: {str(error).removeprefix(path).strip()}"
    except OSError as error:
        return 0.0, f"unreadable: {error.strerror or error}"


def probe_headers(paths: Sequence[str], workers: WorkerRange = None, reserve: Reservation = AS_NEEDED) -> dict[str, tuple[float, str]]:
    """Path → (seconds, problem) of every recording.

    `workers` of the Ray cluster share the work; None takes what there is room for, or this process when there is little
    to do; 0 is always this process.
    """
    if in_this_process(workers) or (workers is None and len(paths) < FEW):
        return {path: probe_header(path) for path in paths}
    return dict(_probe_with_ray(paths, workers, reserve))


def _probe_with_ray(paths: Sequence[str], workers: WorkerRange, reserve: Reservation) -> Iterator[tuple[str, tuple[float, str]]]:
    import pyarrow as pa
    import ray.data

    from pipelines import cluster

    cluster.connect()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    blocks = [pa.table({"path": paths[first : first + _BLOCK]}) for first in range(0, len(paths), _BLOCK)]
    pool = cluster.pool(Reservation(cpus=1, gpus=0), len(blocks), workers, reserve)
    cluster.await_room(pool, "reading headers")
    headers = ray.data.from_arrow(blocks).map_batches(
        probe_batch, batch_size=None, batch_format="numpy", compute=ray.data.TaskPoolStrategy(size=pool.largest), **pool.reserves()
    )
    for batch in headers.iter_batches(batch_size=None, batch_format="numpy"):
        for path, seconds, problem in zip(batch["path"], batch["seconds"], batch["problem"], strict=True):
            yield str(path), (float(seconds), str(problem))
