"""The clips of a training: those a stage wants, made into examples and dealt to workers in the order of `Order`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.features.store import FeatureStore
from pipelines.features.table import TEXTS
from pipelines.training.checkpoint import Progress
from pipelines.training.order import Order, Turn
from stages.base import Stage
from stages.config import Recipe
from stages.errors import UserError

VALIDATION_EPOCH = 2**31  # an epoch number no training reaches: validation draws are the same every time


def clip_rng(seed: int, turn: Turn) -> np.random.Generator:
    """The generator of one example; equal for equal arguments, on every worker."""
    again = [turn.repeat] if turn.repeat else []
    return np.random.default_rng([seed, turn.epoch, turn.clip, *again])


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one optimiser step, the same on all workers."""
    return np.random.default_rng([seed, 0x57E9, step])


class ClipDataset(Dataset):
    """The clips of a split that a stage wants, with their arrays from the series it reads. Holds their numbers alone.

    Args:
        corpora: only these; by default all.
        turns: how often the clips of a corpus come in an epoch; once where nothing is said, never for 0.

    Attributes:
        numbers: of the clips, ascending, [n] int64.
    """

    def __init__(
        self,
        store: FeatureStore,
        stage: type[Stage],
        series: Sequence[str],
        split: str,
        corpora: Sequence[str] = (),
        turns: Mapping[str, float] | None = None,
    ) -> None:
        self.store, self.table, self.reader = store, store.table, store.reader(series)
        mask = self.reader.mask & self.table.among("split", [split]) & self.table.with_texts(stage.needs)
        if corpora:
            mask &= self.table.among("corpus", corpora)
        self.corpora, self.turns = tuple(corpora), dict(turns or {})
        if none := [corpus for corpus, weight in self.turns.items() if weight == 0]:
            mask &= ~self.table.among("corpus", none)
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

    def clip(self, index: int, series: Sequence[str] = ()) -> dict[str, Any]:
        """Id and texts of clip `index`, with its arrays by member name: those of `series`, by default of all."""
        number = int(self.numbers[index])
        return self.table.row(number, ("clip_id", *TEXTS)) | self.reader.read(number, series)

    def order(self, seed: int) -> Order:
        """In which order a training sees them."""
        starts = np.searchsorted(self.numbers, self.table.shard_starts)
        if all(weight == 1 for weight in self.turns.values()):
            return Order(starts, seed)
        weights = np.ones(len(self), np.float32)
        for corpus, weight in self.turns.items():
            weights[self.table.among("corpus", [corpus])[self.numbers]] = weight
        return Order(starts, seed, weights)

    def fetch_ahead(self, order: Order, epoch: int, group: int) -> None:
        """Of a remote store, bring the shards of a group and of the one after it to this machine's disk, those before go.

        Returns at once.
        """
        if self.reader.remote:
            wanted = [self.table.shard_of(int(self.numbers[i])) for g in (group, group + 1) for i in order.clips_of(epoch, g)]
            threading.Thread(target=self.reader.fetch, args=(wanted,), daemon=True, name="fetch shards").start()


class Examples(Dataset):
    """(turn, series read) → the stage's training example of that clip."""

    def __init__(self, clips: ClipDataset, stage: Stage, seed: int) -> None:
        self.clips, self.stage, self.seed = clips, stage, seed

    def __getitem__(self, wanted: tuple[Turn, Sequence[str]]) -> dict[str, Tensor]:
        turn, series = wanted
        return self.stage.example(self.clips.clip(turn.clip, series), clip_rng(self.seed, turn))


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack examples of equal shapes."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class Share(NamedTuple):
    """Which of the equal shares of every batch: that of worker `rank` of `world`."""

    rank: int
    world: int


def training_batches(
    examples: Examples, order: Order, recipe: Recipe, share: Share, progress: Progress, loader_workers: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """One worker's micro-batches for each optimiser step that the recipe still has after `progress`.

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

    steps = range(progress.step, recipe.steps)
    starts = range(progress.cursor, progress.cursor + batch * len(steps), batch)

    def micro_batches() -> Iterator[list[tuple[Turn, tuple[str, ...]]]]:
        reached = None
        for step, start in zip(steps, starts, strict=True):
            if (group := order.group_at(start)) != reached:
                reached = group
                clips.fetch_ahead(order, *group)
            series = examples.stage.reads_now(step_rng(examples.seed, step))
            mine = [(turn, series) for turn in order.take(start, batch)[share.rank :: share.world]]
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
    for _ in steps:
        yield [next(loader) for _ in range(-(-own // micro))]


def held_out_share(num_clips: int, share: Share, batch: int, limit: int) -> np.ndarray:
    """Which clips a worker validates on, in at most `limit` batches: its part of some that are spread evenly over all; workers get
    equally many."""
    group = batch * share.world
    groups = max(1, min(limit, num_clips // group))
    chosen = np.linspace(0, num_clips - 1, min(num_clips, groups * group)).astype(int)
    count = len(chosen) // share.world
    return chosen[share.rank :: share.world][:count] if count else chosen


def validation_batches(examples: Examples, share: Share, batch: int, limit: int) -> Iterator[dict[str, Any]]:
    """At most `limit` batches per worker with draws that never change; workers get equally many.

    The i-th batches of all workers are together the same clips for any number of workers (`batch` times it being equal), unless
    there are fewer clips than one such group has: then as many as the workers can share.
    """
    num_clips, seed, series = len(examples.clips), examples.seed, examples.stage.reads_now(None)
    mine = held_out_share(num_clips, share, batch, limit)
    for i in range(0, len(mine), batch):
        turns = [Turn(VALIDATION_EPOCH, int(j), 0) for j in mine[i : i + batch]]
        yield collate([examples[(turn, series)] for turn in turns]) | {"step_rng": step_rng(seed, VALIDATION_EPOCH)}
