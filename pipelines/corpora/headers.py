"""How long recordings are, from their headers, and what they hold, from a hash of their bytes.

Runs on Ray Data's workers, so it lives apart from the job.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from options import AS_NEEDED, Reservation, WorkerRange, in_this_process
from pipelines.corpora.files import MISSING
from pipelines.corpora.spool import chunks
from stages.audio import probe
from stages.errors import AudioError
from stages.recordings import open_recording, parse_address

# Fewer headers than this are read sooner than a Ray cluster starts.
FEW = 4096
_BLOCK = 256  # headers per task
_AT_ONCE = 1 << 19  # headers that Ray is asked for at a time
_THREADS = 4  # reading and hashing leave Python's lock


class Probed(NamedTuple):
    """What is known of a recording's file."""

    seconds: float  # 0 where unknown
    problem: str  # why it cannot be used; "" where there is none
    content: str  # hash of its bytes; "" where they could not be read


def probe_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The column `path` with those of `Probed`. Never raises."""
    seconds, problems, contents = zip(*_probe_here(batch["path"].tolist()), strict=True)
    text = {"problem": np.array(problems, dtype=object), "content": np.array(contents, dtype=object)}
    return {"path": batch["path"], "seconds": np.array(seconds), **text}


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


def content_hash(path: str) -> str:
    """A hash of a recording's bytes, equal for exact copies under any name or address; "" when they cannot be read."""
    digest = hashlib.sha256()  # the fastest on processors with SHA instructions
    try:
        with open_recording(path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()[:32]
    except (OSError, AudioError):
        return ""


def _probe_here(paths: Sequence[str]) -> list[Probed]:
    def probe_one(path: str) -> Probed:
        seconds, problem = probe_header(path)
        return Probed(seconds, problem, "" if problem else content_hash(path))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(probe_one, paths))


def probe_headers(
    paths: Iterable[str], count: int, workers: WorkerRange = None, reserve: Reservation = AS_NEEDED
) -> Iterator[tuple[str, Probed]]:
    """What is known of every recording's file, with its path; in no certain order.

    `workers` of the Ray cluster share the work; None takes what there is room for, or this process when the `count` is small; 0 is
    always this process.
    """
    here = in_this_process(workers) or (workers is None and count < FEW)
    for some in chunks(paths, FEW if here else _AT_ONCE):
        yield from zip(some, _probe_here(some), strict=True) if here else _probe_with_ray(some, workers, reserve)


class Headers:
    """What is known of files, by path, in 36 bytes each."""

    def __init__(self, probed: Iterable[tuple[str, Probed]]) -> None:
        problems: dict[str, int] = {"": 0}

        def packed(path: str, file: Probed) -> tuple[int, float, int, int, int]:
            content = int(file.content or "0", 16)
            return hash(path), file.seconds, problems.setdefault(file.problem, len(problems)), content >> 64, content & (1 << 64) - 1

        row = np.dtype([("path", np.int64), ("seconds", np.float64), ("problem", np.int32), ("high", np.uint64), ("low", np.uint64)])
        parts = [np.array([packed(*one) for one in some], row) for some in chunks(probed)]
        rows = np.concatenate([np.empty(0, row), *parts])
        self._rows = rows[np.argsort(rows["path"])]
        self._paths, self._problems = np.ascontiguousarray(self._rows["path"]), list(problems)

    def __getitem__(self, path: str) -> Probed:
        """Raises KeyError for a path that is not known."""
        place = int(np.searchsorted(self._paths, hash(path)))
        if place == len(self._paths) or self._paths[place] != hash(path):
            raise KeyError(path)
        _, seconds, problem, high, low = self._rows[place].item()
        return Probed(seconds, self._problems[problem], f"{high:016x}{low:016x}" if high or low else "")


def _probe_with_ray(paths: Sequence[str], workers: WorkerRange, reserve: Reservation) -> Iterator[tuple[str, Probed]]:
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
        columns = (batch[name] for name in ("path", *Probed._fields))
        for path, seconds, problem, content in zip(*columns, strict=True):
            yield str(path), Probed(float(seconds), str(problem), str(content))
