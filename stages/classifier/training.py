"""Classifier training: cross-entropy on the first label of each clip, under light augmentation."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.audio import LOG_FLOOR, rolled
from stages.base import ClipSource, Stage
from stages.classifier.model import Classifier, ClassifierConfig
from stages.files import write_json
from stages.variants import Variant

UNKNOWN = -100  # target of a clip whose label no training clip has; it counts in no measure


class ClassifierStage(Stage):
    """Learns to name the clips of the store that have labels; a clip's class is its first label."""

    name = "classifier"
    best_by = "cross_entropy"
    needs = ("labels",)
    series = ("mel",)
    otherwise = "or leave it out: `loa evaluate` then scores without recognition"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.model = Classifier(config)
        self.index = {name: i for i, name in enumerate(config.classes)}

    @classmethod
    def prepare(
        cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path, start: Path | None = None
    ) -> None:
        """Collect the class names of the training clips into `classes.json`."""
        write_json(folder / "classes.json", sorted({row["labels"][0] for row in dataset.texts()}))

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> ClassifierStage:
        classes = json.loads((released("prepared") / "classes.json").read_text(encoding="utf-8"))
        return cls(dataclasses.replace(variant.classifier, classes=tuple(classes)))

    @classmethod
    def asks(cls, variant: Variant) -> str:
        return "clips with labels, of at least two kinds"

    @classmethod
    def learns_from(cls, dataset: ClipSource) -> bool:
        classes = set()
        for row in dataset.texts():
            classes.add(row["labels"][0])
            if len(classes) >= 2:
                return True
        return False

    def parts(self) -> dict[str, nn.Module]:
        return {"classifier": self.model}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """`mel` [F, M], `target` [], and the augmentation: `gain` (log), `roll` (frames), `hide` [2, 2] (axis; from, to)."""
        mel = np.asarray(clip["mel"], np.float32)
        hide = []
        for length in mel.shape:  # SpecAugment: up to an eighth of the frames and of the bins
            size = rng.integers(length // 8 + 1)
            first = rng.integers(length - size + 1)
            hide.append((first, first + size))
        return {
            "mel": torch.from_numpy(mel),
            "target": torch.tensor(self.index.get(clip["labels"][0], UNKNOWN)),
            "gain": torch.tensor(float(rng.uniform(math.log(0.5), math.log(2.0)))),
            "roll": torch.tensor(int(rng.integers(len(mel)))),
            "hide": torch.tensor(hide),
        }

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        loss, accuracy = _measure(self.model(augment(batch)), batch["target"])
        yield "classifier", loss, {"cross_entropy": loss, "accuracy": accuracy}

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        loss, accuracy = _measure(self.model(batch["mel"]), batch["target"])
        return {"cross_entropy": loss, "accuracy": accuracy}

    def homes(self) -> dict[str, nn.Module]:
        return {"model.safetensors": self.model}

    def save(self, folder: Path) -> None:
        self.model.save(folder)


def augment(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's mels `[B, F, M]` at another level, rolled in time, with a stretch of frames and of bins silenced."""
    mel, floor = batch["mel"], math.log(LOG_FLOOR)
    frames, bins = (torch.arange(length, device=mel.device) for length in mel.shape[1:])
    mel = rolled(mel, batch["roll"]) + batch["gain"][:, None, None]
    first, last = batch["hide"][..., :1], batch["hide"][..., 1:]  # [B, 2, 1]
    hidden_frames = (frames >= first[:, 0]) & (frames < last[:, 0])
    hidden_bins = (bins >= first[:, 1]) & (bins < last[:, 1])
    return mel.clamp(min=floor).masked_fill(hidden_frames[:, :, None] | hidden_bins[:, None], floor)


def _measure(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the clips of known class; 0 where there is none."""
    known = target != UNKNOWN
    count = known.sum().clamp(min=1)
    loss = F.cross_entropy(logits.float(), target, ignore_index=UNKNOWN, reduction="sum") / count
    accuracy = ((logits.argmax(1) == target) & known).sum() / count
    return loss, accuracy
