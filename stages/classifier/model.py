"""A small convolutional network that recognises the label of a clip from its log-mel spectrogram.

Evaluation uses it where no large tagger is available: class probabilities for KL and inception score, the
penultimate layer for a Fréchet distance. It is trained on the store's own labels in about a minute on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.checkpoints import load_network, save_network
from stages.errors import UserError

MEL_MEAN, MEL_STD = -6.0, 3.0  # rough level and spread of log-mel values; the floor, ln 1e-5, becomes -1.8


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier; 0.32 M parameters by default."""

    classes: tuple[str, ...] = ()  # label names in the order of the logits; collected from the training clips
    width: int = 32  # channels of the first layer; later ones have twice and four times as many
    embedding_width: int = 128
    groups: int = 8  # GroupNorm: unlike BatchNorm it does not depend on a clip's neighbours or on the number of workers

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise UserError(f"the classifier's width {self.width} is no multiple of its {self.groups} groups")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one; halves both axes. `[B, C, F, M]` to `[B, D, F / 2, M / 2]`."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.skip = nn.Conv2d(channels, width, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(y)))


class Classifier(nn.Module):
    """Log-mel spectrogram to class logits; accepts any number of frames and mel bins from 8 on."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        if len(config.classes) < 2:
            raise UserError(f"a classifier needs at least two classes, got {list(config.classes)}")
        self.config = config
        width = config.width
        self.stem = nn.Conv2d(1, width, (7, 5), stride=(4, 2), padding=(3, 2))  # to 40 ms x two bins: a quarter of the cost of 10 ms
        self.blocks = nn.Sequential(ResidualBlock(width, 2 * width, config.groups), ResidualBlock(2 * width, 4 * width, config.groups))
        self.project = nn.Linear(8 * width, config.embedding_width)
        self.head = nn.Linear(config.embedding_width, len(config.classes))

    def embedding(self, mel: Tensor) -> Tensor:
        """Penultimate features `[B, embedding_width]` of log-mel spectrograms `[B, F, M]`."""
        x = ((mel - MEL_MEAN) / MEL_STD)[:, None]
        x = F.relu(self.stem(x)).contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        x = self.blocks(x)
        # the mean over the clip responds to textures, the maximum to single events
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return F.relu(self.project(pooled))

    def forward(self, mel: Tensor) -> Tensor:
        """Class logits `[B, classes]` of log-mel spectrograms `[B, F, M]`."""
        return self.head(self.embedding(mel))

    def logits(self, mel: Tensor) -> Tensor:
        """Class logits `[B, classes]` of log-mel spectrograms `[B, F, M]`, in the order of `config.classes`."""
        return self(mel)

    def save(self, folder: Path) -> None:
        """Write `config.json` (with the class names) and `model.safetensors`."""
        save_network(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """The network that `save` wrote, in evaluation mode."""
        return load_network(cls, ClassifierConfig(), folder, "run `loa train classifier`")
