"""Which clip comes when: a training order that depends on (seed, epoch, store) and on nothing else."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.features.store import FeatureStore
from stages.base import Stage
from stages.errors import UserError

VALIDATION_EPOCH = 2**31  # an epoch number no training reaches: validation draws are the same every time


@functools.lru_cache(maxsize=2)
def permutation(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, [num_clips] int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_clips)


def clip_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one example; equal for equal arguments, on every worker."""
    return np.random.default_rng([seed, epoch, index])


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one optimiser step, the same on all workers."""
    return np.random.default_rng([seed, 0x57E9, step])


def places(cursor: int, count: int, num_clips: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index) of the `count` clips after the first `cursor` ones; epochs follow each other without a gap."""
    found = []
    for position in range(cursor, cursor + count):
        epoch, offset = divmod(position, num_clips)
        found.append((epoch, int(permutation(num_clips, seed, epoch)[offset])))
    return found


class ClipDataset(Dataset):
    """The clips of a split that a stage wants, with their arrays from the series it reads."""

    def __init__(self, store: FeatureStore, stage: type[Stage], series: Sequence[str], split: str, corpora: Sequence[str] = ()) -> None:
        self.reader = store.reader(series)
        table = store.clips().set_index("clip_id", drop=False)
        table = table.loc[[c for c in self.reader.clip_ids if c in table.index]]
        table = table[table["split"] == split]
        if corpora:
            table = table[table["corpus"].isin(list(corpora))]
        self.rows: list[dict[str, Any]] = [row for row in table.to_dict("records") if stage.wants(row)]

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, index: int) -> dict[str, Any]:
        """Row `index` with its arrays by member name."""
        row = self.rows[index]
        return row | self.reader.read(row["clip_id"])


class Examples(Dataset):
    """(epoch, index) → the stage's training example of that clip."""

    def __init__(self, clips: ClipDataset, stage: Stage, seed: int) -> None:
        self.clips, self.stage, self.seed = clips, stage, seed

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        return self.stage.example(self.clips.clip(index), clip_rng(self.seed, epoch, index))


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack examples of equal shapes."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class _Shares:
    """Batch sampler: this worker's micro-batches, from `cursor` clips onwards."""

    def __init__(
        self, num_clips: int, seed: int, cursor: int, steps: int, global_batch: int, micro_batch: int, rank: int, world: int
    ) -> None:
        self.args = (num_clips, seed, cursor, steps, global_batch, micro_batch, rank, world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        num_clips, seed, cursor, steps, global_batch, micro_batch, rank, world = self.args
        for step in range(steps):
            share = places(cursor + step * global_batch, global_batch, num_clips, seed)[rank::world]
            yield from (share[i : i + micro_batch] for i in range(0, len(share), micro_batch))


def training_batches(
    clips: ClipDataset,
    stage: Stage,
    seed: int,
    cursor: int,
    steps: int,
    global_batch: int,
    micro_batch: int | None,
    rank: int,
    world: int,
    loader_workers: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """For each of `steps` optimiser steps the micro-batches of worker `rank` of `world`.

    Raises UserError when the global batch cannot be shared equally.
    """  # fmt: skip
    if global_batch % world:
        raise UserError(f"global_batch {global_batch} cannot be shared by {world} workers; choose a multiple of {world}")
    if not len(clips):
        raise UserError(
            f"no clip of the training split suits the stage {stage.name!r}; look at the captions, labels and splits in its clips.parquet"
        )
    share = global_batch // world
    micro = min(micro_batch or share, share)
    shares = _Shares(len(clips), seed, cursor, steps, global_batch, micro, rank, world)
    loader = iter(
        DataLoader(
            Examples(clips, stage, seed),
            batch_sampler=shares,
            collate_fn=collate,
            num_workers=loader_workers,
            multiprocessing_context="fork" if loader_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )
    for _ in range(steps):
        yield [next(loader) for _ in range(-(-share // micro))]


def validation_batches(
    clips: ClipDataset, stage: Stage, seed: int, batch: int, limit: int, rank: int, world: int
) -> Iterator[dict[str, Any]]:
    """At most `limit` batches per worker with draws that never change; workers get equally many."""
    examples = Examples(clips, stage, seed)
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), limit * batch * world)).astype(int)
    count = len(chosen) // world
    mine = chosen[rank::world][:count] if count else chosen
    for i in range(0, len(mine), batch):
        yield collate([examples[(VALIDATION_EPOCH, int(j))] for j in mine[i : i + batch]]) | {"step_rng": step_rng(seed, VALIDATION_EPOCH)}
