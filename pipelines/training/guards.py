"""What a training watches over, besides gradients that are not finite: losses that jump, and critics that teach nothing."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.tracking import Tracker

LOSS = "loss/"  # what a part's own loss is logged under
WINDOW = 200  # steps whose losses say what is usual
ENOUGH = 50  # of them, before anything is unusual
FAR = 10.0  # deviations above the median
FLAT = 0.02  # least deviation, as a share of the median: a loss that hardly moves at all makes no noise
OVER = 10  # usual steps in a row that end a spike
LOGS = 50  # in which a critic must have taught nothing
BLIND, DONE = 0.52, 0.01  # its accuracy at most, or its doubt at most
NAMED = 5  # spikes that are told with their clips; all are logged
CLIPS = 8  # named of a batch


class Spike(NamedTuple):
    """A loss far above what is usual."""

    part: str
    step: int
    loss: float
    usual: float  # the median before


class Spikes:
    """Finds spikes in the losses of parts, one number a step."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = {}
        self.calm: dict[str, int] = {}  # usual steps since the last unusual one

    def see(self, step: int, losses: Mapping[str, float]) -> list[Spike]:
        """The spikes that begin with this step's losses, by part. Where another part joins in, losses are others: it begins anew."""
        if losses.keys() != self.recent.keys():
            self.recent = {part: deque(maxlen=WINDOW) for part in losses}
            self.calm = dict.fromkeys(losses, OVER)
        found = []
        for part, loss in losses.items():
            if not math.isfinite(loss):
                continue  # its gradients are not, either: another guard's
            recent = self.recent[part]
            if len(recent) >= ENOUGH:
                usual = float(np.median(recent))
                deviation = 1.4826 * float(np.median(np.abs(np.asarray(recent) - usual)))  # of a normal distribution, the standard one
                if loss > usual + FAR * max(deviation, FLAT * abs(usual)):
                    if self.calm[part] >= OVER:
                        found.append(Spike(part, step, loss, usual))
                    self.calm[part] = 0
                else:
                    self.calm[part] += 1
            recent.append(loss)
        return found


class Critic:
    """Finds out when a critic teaches nothing, by what `stages.adversarial.standing` logs of it."""

    def __init__(self) -> None:
        self.recent: deque[tuple[float, float]] = deque(maxlen=LOGS)
        self.told = ""

    def see(self, accuracy: float, doubt: float) -> str:
        """What is wrong with it now, in words, when that begins; "" else."""
        self.recent.append((accuracy, doubt))
        now = self._fault() if len(self.recent) == LOGS else ""
        news, self.told = now if now != self.told else "", now
        return news

    def _fault(self) -> str:
        accuracies, doubts = zip(*self.recent, strict=True)
        if np.mean(accuracies) <= BLIND:
            return "it no longer tells real from made, so that it teaches the generator nothing"
        if max(doubts) <= DONE:
            return "it is never wrong, so that it learns nothing and its verdict hardly changes with what it judges"
        return ""


class Guard:
    """Watches one run: `add` keeps every step's losses on the device, `look` reads them all at once, at a log."""

    def __init__(self, stage: str, rank: int, world: int, steps_before: int = 0) -> None:
        self.stage, self.rank, self.world, self.steps_before = stage, rank, world, steps_before  # the last: of earlier phases, in one curve
        self.spikes, self.critic = Spikes(), Critic()
        self.waiting: list[tuple[int, int, dict[str, Tensor]]] = []  # step, cursor, losses
        self.told = 0

    def add(self, step: int, cursor: int, logs: Mapping[str, Tensor]) -> None:
        """Keep the losses of a step, which read the clips from `cursor` on."""
        self.waiting.append((step, cursor, {k.removeprefix(LOSS): v for k, v in logs.items() if k.startswith(LOSS)}))

    def look(self, means: Mapping[str, float], clips_at: Callable[[int], Sequence[str]], tracker: Tracker) -> None:
        """Warn of what the steps since the last look show, with `means` of their logs; every worker must call it.

        `clips_at(cursor)` names the clips of a batch.
        """
        for (step, cursor, _), losses in zip(self.waiting, self._read(), strict=True):
            for spike in self.spikes.see(step, losses):
                tracker.metrics({f"guards/spike_{spike.part}": spike.loss}, self.steps_before + step)
                self.told += 1
                if self.told <= NAMED:
                    what = f"the loss of {spike.part!r} jumped to {spike.loss:.3g} at step {step}; the median before is {spike.usual:.3g}"
                    self._warn(f"{what}; its clips: {listed(clips_at(cursor))}")
        self.waiting = []
        if "critic_accuracy" in means and (fault := self.critic.see(means["critic_accuracy"], means["critic_doubt"])):
            accuracy, doubt = means["critic_accuracy"], means["critic_doubt"]
            figures = f"accuracy {accuracy:.2f}, where 0.5 is chance, and {doubt:.2g} of a guessing critic's loss, over {LOGS} logs"
            tracker.metrics({"guards/dead_critic": accuracy}, self.steps_before + step)
            self._warn(f"the critic is of no use up to step {step}: {fault} ({figures})")

    def _warn(self, what: str) -> None:
        if self.rank == 0:
            print(f"{self.stage}: {what}", file=sys.stderr)

    def _read(self) -> list[dict[str, float]]:
        """The losses of all waiting steps, averaged over the workers."""
        values = [loss.float() for _, _, losses in self.waiting for loss in losses.values()]
        if not values:
            return [{} for _ in self.waiting]
        packed = torch.stack(values)
        if self.world > 1:
            dist.all_reduce(packed)
            packed /= self.world
        numbers = iter(packed.tolist())
        return [{part: next(numbers) for part in losses} for _, _, losses in self.waiting]


def listed(names: Sequence[str]) -> str:
    """Some names and how many more there are."""
    more = len(names) - CLIPS
    return ", ".join(names[:CLIPS]) + (f" and {more} more" if more > 0 else "")
