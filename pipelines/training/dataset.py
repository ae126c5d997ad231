"""Which clip comes when: a training order that depends on (seed, epoch, store) and on nothing else."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.features.store import FeatureStore
from pipelines.features.table import TEXTS
from stages.base import Stage
from stages.config import Recipe
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
    positions = []
    for position in range(cursor, cursor + count):
        epoch, offset = divmod(position, num_clips)
        positions.append((epoch, int(permutation(num_clips, seed, epoch)[offset])))
    return positions


class ClipDataset(Dataset):
    """The clips of a split that a stage wants, with their arrays from the series it reads. Holds their numbers alone.

    Attributes:
        numbers: of the clips, ascending, [n] int64.
    """

    def __init__(self, store: FeatureStore, stage: type[Stage], series: Sequence[str], split: str, corpora: Sequence[str] = ()) -> None:
        self.table, self.reader = store.table, store.reader(series)
        mask = self.reader.mask & self.table.among("split", [split]) & self.table.with_texts(stage.needs)
        if corpora:
            mask &= self.table.among("corpus", corpora)
        self.numbers = np.flatnonzero(mask)

    def __len__(self) -> int:
        return len(self.numbers)

    def texts(self) -> Iterator[dict[str, Any]]:
        """Captions, labels and transcript of every clip, in order."""
        return self.table.take(self.numbers, TEXTS)

    def licences(self) -> dict[str, int]:
        """How many clips have each licence, as their corpora state it."""
        counts = {name: int(self.table.among("licence", [name])[self.numbers].sum()) for name in self.table.values("licence")}
        return {name: count for name, count in counts.items() if count}

    def clip(self, index: int) -> dict[str, Any]:
        """Id and texts of clip `index`, with its arrays by member name."""
        number = int(self.numbers[index])
        return self.table.row(number, ("clip_id", *TEXTS)) | self.reader.read(number)


class Examples(Dataset):
    """(epoch, index) → the stage's training example of that clip."""

    def __init__(self, clips: ClipDataset, stage: Stage, seed: int) -> None:
        self.clips, self.stage, self.seed = clips, stage, seed

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = position
        return self.stage.example(self.clips.clip(index), clip_rng(self.seed, epoch, index))


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack examples of equal shapes."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class Share(NamedTuple):
    """Which of the equal shares of every batch: that of worker `rank` of `world`."""

    rank: int
    world: int


def training_batches(
    examples: Examples, recipe: Recipe, share: Share, cursor: int, steps: int, loader_workers: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """For each of `steps` optimiser steps one worker's micro-batches, from the clip after the first `cursor` onwards.

    Raises UserError when the global batch cannot be shared equally.
    """
    clips, batch = examples.clips, recipe.global_batch
    if batch % share.world:
        raise UserError(f"global_batch {batch} cannot be shared by {share.world} workers; choose a multiple of {share.world}")
    if not len(clips):
        raise UserError(
            f"no clip of the training split can be used by the stage {examples.stage.name!r}; "
            "check the captions, labels and splits of its clip table"
        )
    own = batch // share.world
    micro = min(recipe.micro_batch or own, own)

    def micro_batches() -> Iterator[list[tuple[int, int]]]:
        for step in range(steps):
            mine = places(cursor + step * batch, batch, len(clips), examples.seed)[share.rank :: share.world]
            yield from (mine[i : i + micro] for i in range(0, own, micro))

    loader = iter(
        DataLoader(
            examples,
            batch_sampler=micro_batches(),
            collate_fn=collate,
            num_workers=loader_workers,
            multiprocessing_context="fork" if loader_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )
    for _ in range(steps):
        yield [next(loader) for _ in range(-(-own // micro))]


def validation_batches(examples: Examples, share: Share, batch: int, limit: int) -> Iterator[dict[str, Any]]:
    """At most `limit` batches per worker with draws that never change; workers get equally many."""
    num_clips, seed = len(examples.clips), examples.seed
    chosen = np.linspace(0, num_clips - 1, min(num_clips, limit * batch * share.world)).astype(int)
    count = len(chosen) // share.world
    mine = chosen[share.rank :: share.world][:count] if count else chosen
    for i in range(0, len(mine), batch):
        yield collate([examples[(VALIDATION_EPOCH, int(j))] for j in mine[i : i + batch]]) | {"step_rng": step_rng(seed, VALIDATION_EPOCH)}
