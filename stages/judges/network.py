"""What every judge's network says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Network(nn.Module):
    """Waveforms `[B, T]` to (embeddings `[B, D]` or `[B, W, D]`, logits `[B, 527]` or None), in evaluation mode.

    `forward` raises ValueError for clips that are too short or too long; a clip's result depends on that clip alone.
    """

    sample_rate: int  # Hz
    embedding_width: int  # D
    has_logits: bool

    def published(self, state: Mapping[str, Tensor], source: object) -> Mapping[str, Tensor]:
        """The weights of a published checkpoint under this network's names; UserError when they belong to another network."""
        return state

    def fuse(self) -> None:
        """Make evaluation on a CPU faster with the same results, up to rounding; afterwards the weights may have other names."""
