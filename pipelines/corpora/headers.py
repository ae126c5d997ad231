"""How long recordings are, from their headers alone. Runs on Ray Data's workers, so it lives apart from the job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.corpora.files import MISSING
from stages.audio import probe
from stages.errors import AudioError
from stages.recordings import parse_address

# Fewer headers than this are read sooner than a Ray cluster starts.
FEW = 4096
_BLOCK = 256  # headers per task


def probe_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The column `path` with `seconds` (0 where unknown) and `problem` ("" where there is none). Never raises."""
    headers = [probe_header(path) for path in batch["path"]]
    seconds, problems = zip(*headers, strict=True)
    return {"path": batch["path"], "seconds": np.array(seconds), "problem": np.array(problems, dtype=object)}


def probe_header(path: str) -> tuple[float, str]:
    """(seconds, "") of a recording at a path or address, or (0, the reason why it cannot be used)."""
    address = parse_address(path)
    if not address.remote and not os.path.isfile(address.file):  # also a pipe or a device, which would be waited for without end
        return 0.0, "unreadable: it is no regular file" if os.path.exists(address.file) else MISSING
    try:
        if not address.remote and os.path.getsize(address.file) == 0:
            return 0.0, "empty: the file has no bytes"
        return probe(path).seconds, ""
    except AudioError as error:
        kind = "empty" if "is empty" in str(error) else "unreadable"
        return 0.0, f"{kind}: {str(error).removeprefix(path).strip()}"
    except FileNotFoundError:
        return 0.0, MISSING
    except OSError as error:
        return 0.0, f"unreadable: {error.strerror or error}"


def probe_headers(paths: Sequence[str], workers: int | None = None) -> dict[str, tuple[float, str]]:
    """Path → (seconds, problem) of every recording.

    `workers` CPUs of the Ray cluster share the work; None takes what is free, or this process when there is little
    to do; 0 is always this process.
    """
    if workers == 0 or (workers is None and len(paths) < FEW):
        return {path: probe_header(path) for path in paths}
    return dict(_probe_with_ray(paths, workers))


def _probe_with_ray(paths: Sequence[str], workers: int | None) -> Iterator[tuple[str, tuple[float, str]]]:
    import pyarrow as pa
    import ray.data

    from pipelines import cluster

    cluster.connect()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    blocks = [pa.table({"path": paths[first : first + _BLOCK]}) for first in range(0, len(paths), _BLOCK)]
    pool = cluster.cpu_pool(cluster.cluster_resources(), len(blocks), workers)
    headers = ray.data.from_arrow(blocks).map_batches(
        probe_batch, batch_size=None, batch_format="numpy", num_cpus=1, compute=ray.data.TaskPoolStrategy(size=pool.size)
    )
    for batch in headers.iter_batches(batch_size=None, batch_format="numpy"):
        for path, seconds, problem in zip(batch["path"], batch["seconds"], batch["problem"], strict=True):
            yield str(path), (float(seconds), str(problem))
