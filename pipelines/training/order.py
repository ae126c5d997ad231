"""Which clip comes when: an order that depends on (seed, epoch, clips, weights) and on nothing else."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

GROUP = 64  # shards that are read together: far fewer than a store holds, far more clips than a batch has
_SHARDS, _TURNS = 1 << 32, 1 << 33  # streams of random numbers; those below belong to the groups of an epoch


class Turn(NamedTuple):
    """One clip's turn."""

    epoch: int
    clip: int  # among those of the dataset
    repeat: int  # how often the clip had a turn in this epoch before


class Order:
    """The order in which a training sees its clips; one epoch follows the other without a gap.

    Every epoch shuffles the shards, takes them in groups of `GROUP`, and shuffles the clips of each group: a worker reads
    some shards at a time instead of a store at random. A store of one group is shuffled whole. A clip of weight w has w turns
    an epoch; of a fraction, as many clips have one turn more as make it true, others in every epoch.

    Args:
        starts: first clip of every shard among those of the dataset, and their number behind: [shards + 1], ascending.
        seed: of the training.
        weights: turns of every clip in an epoch, [clips]; by default one each. Equal weights are held exactly over all their clips.
    """

    def __init__(self, starts: np.ndarray, seed: int, weights: np.ndarray | None = None) -> None:
        self.starts, self.seed, self.weights = starts[np.r_[True, np.diff(starts) > 0]], seed, weights
        self._classes = [] if weights is None else [np.flatnonzero(weights == w) for w in np.unique(weights) if w > 0]
        self._totals = [] if weights is None else [round(float(weights[c[0]]) * len(c)) for c in self._classes]
        self.length = int(self.starts[-1]) if weights is None else sum(self._totals)  # turns of an epoch
        self._groups = lru_cache(4)(self._make_groups)
        self._turns = lru_cache(4)(self._make_turns)

    def take(self, cursor: int, count: int) -> list[Turn]:
        """The `count` turns after the first `cursor` ones."""
        turns = []
        for position in range(cursor, cursor + count):
            epoch, group, offset = self._find(position)
            clip, repeat = self._turns(epoch, group)[:, offset].tolist()
            turns.append(Turn(epoch, clip, repeat))
        return turns

    def group_at(self, cursor: int) -> tuple[int, int]:
        """(epoch, group) of the turn after the first `cursor` ones."""
        return self._find(cursor)[:2]

    def clips_of(self, epoch: int, group: int) -> np.ndarray:
        """The first clip of every shard of a group; of the group after an epoch's last one, those of the next epoch's first."""
        groups, _ = self._groups(epoch)
        return self.starts[groups[group]] if group < len(groups) else self.clips_of(epoch + 1, 0)

    def _find(self, position: int) -> tuple[int, int, int]:
        epoch, offset = divmod(position, self.length)
        _, ends = self._groups(epoch)
        group = int(np.searchsorted(ends, offset, "right"))
        return epoch, group, offset - (int(ends[group - 1]) if group else 0)

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, stream]))

    def _make_groups(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of every group of an epoch, and the turns that are over after each group."""
        shards = np.arange(len(self.starts) - 1)
        if len(shards) > GROUP:
            shards = self._generator(epoch, _SHARDS).permutation(shards)
        groups = [np.sort(group) for group in np.array_split(shards, -(-len(shards) // GROUP))]  # of equal size, give or take a shard
        counts = self._counts(epoch)
        turns = np.diff(self.starts) if counts is None else np.add.reduceat(counts, self.starts[:-1])
        return groups, np.cumsum([turns[group].sum() for group in groups])

    def _make_turns(self, epoch: int, group: int) -> np.ndarray:
        """(clip, repeat) of every turn of a group, in order: [2, turns] int64."""
        shards, counts = self._groups(epoch)[0][group], self._counts(epoch)
        clips = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards])
        repeats = np.zeros_like(clips)
        if counts is not None:
            clips = np.repeat(clips, counts[clips])
            repeats = np.arange(len(clips)) - np.searchsorted(clips, clips)
        return np.stack([clips, repeats])[:, self._generator(epoch, group).permutation(len(clips))]

    def _counts(self, epoch: int) -> np.ndarray | None:
        """Turns of every clip in an epoch, [clips]; None for one each.

        Systematic sampling: of n clips of weight w, the i-th has the whole numbers in (iw + u, (i + 1)w + u], u drawn anew
        for every epoch; w is rounded so that nw is whole, and all epochs have the same length.
        """
        if self.weights is None:
            return None
        draw, counts = self._generator(epoch, _TURNS), np.zeros(len(self.weights), np.int64)
        for clips, total in zip(self._classes, self._totals, strict=True):
            edges = np.floor(np.arange(len(clips) + 1) * (total / len(clips)) + draw.random())
            edges[-1] = edges[0] + total  # rounding may not lose a turn
            counts[draw.permutation(clips)] = np.diff(edges)
        return counts
