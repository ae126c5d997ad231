"""VGGish (Hershey et al. 2017): the judge behind FAD (references.md#vggish), under both windowings in use.

Parameters carry the names of torchvggish's `vggish-10086976.pth`. Scores of the two windowings differ by a few per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from stages.audio import htk_filterbank
from stages.errors import UserError
from stages.judges.network import Network

SAMPLE_RATE = 16_000  # Hz
FRAME, HOP, N_FFT = 400, 160, 512  # samples
MEL_BINS, FMIN, FMAX = 64, 125.0, 7500.0  # Hz
LOG_OFFSET = 0.01  # added to the mel magnitudes before their logarithm
EXAMPLE = 96  # frames that the network sees at once, 0.96 s
GOOGLE_WINDOW, GOOGLE_HOP = 16_000, 8_000  # samples


@dataclass(frozen=True)
class VGGishConfig:
    """Sizes of VGGish, and how clips are cut; the default sizes are the published ones."""

    windowing: str = "audioldm_eval"  # one spectrogram per clip, cut every 0.96 s; "google": 1 s of scaled samples every 0.5 s
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)  # channels before each pooling
    hidden: int = 4096
    embedding_width: int = 128

    def __post_init__(self) -> None:
        if self.windowing not in ("audioldm_eval", "google"):
            raise UserError(f"VGGish's windowing is {self.windowing!r}; expected audioldm_eval or google")


class VGGish(Network):
    """Waveform to one embedding per example of 0.96 s. The last layer has no activation, and neither PCA nor quantisation follows."""

    has_logits = False
    sample_rate = SAMPLE_RATE

    def __init__(self, config: VGGishConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_width = config.embedding_width
        layers: list[nn.Module] = []
        channels = 1
        for width, convolutions in zip(config.widths, (1, 1, 2, 2), strict=True):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = (EXAMPLE // 16) * (MEL_BINS // 16) * channels
        self.embeddings = nn.Sequential(
            nn.Linear(flat, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.embedding_width),
        )

    def forward(self, waveform: Tensor) -> tuple[Tensor, None]:
        """Embeddings `[B, W, 128]` of waveforms `[B, T]` in [-1, 1]; 10 s give 10 examples, or 19 with Google's windowing.

        Raises ValueError for clips shorter than one example.
        """
        examples = self.examples(waveform)
        x = self.features(examples.flatten(0, 1)[:, None])
        flat = x.permute(0, 2, 3, 1).flatten(1)  # the fully connected layers were trained on (time, frequency, channel)
        return self.embeddings(flat).unflatten(0, examples.shape[:2]), None

    def examples(self, waveform: Tensor) -> Tensor:
        """Log-mel examples `[B, W, 96, 64]`; an incomplete one at the end is left out."""
        google = self.config.windowing == "google"
        shortest = GOOGLE_WINDOW if google else (EXAMPLE - 1) * HOP + FRAME
        if waveform.shape[-1] < shortest:
            raise ValueError(f"VGGish needs clips of at least {shortest} samples at {SAMPLE_RATE} Hz, got {waveform.shape[-1]}")
        if google:
            # the reference scales by the largest sample, not the largest magnitude, and quiet clips by 20 dB at most
            scaled = waveform / waveform.amax(-1, keepdim=True).clamp(min=0.1)
            return log_mel(scaled.unfold(-1, GOOGLE_WINDOW, GOOGLE_HOP))[:, :, :EXAMPLE]
        frames = log_mel(waveform)
        count = frames.shape[1] // EXAMPLE
        return frames[:, : count * EXAMPLE].unflatten(1, (count, EXAMPLE))


def log_mel(waveform: Tensor) -> Tensor:
    """ln(M |STFT| + 0.01) of `[..., T]`: `[..., 1 + (T - 400) // 160, 64]`, float32.

    Whole frames of 25 ms every 10 ms under a periodic Hann window, magnitudes (not power) of a 512-point transform, HTK mel.
    Computed in float64, as the reference does.
    """
    window, filters = (constant.to(waveform.device) for constant in _constants())
    frames = waveform.double().unfold(-1, FRAME, HOP)
    magnitude = torch.fft.rfft(frames * window, n=N_FFT).abs()
    return (magnitude @ filters + LOG_OFFSET).log().float()


@lru_cache(maxsize=1)
def _constants() -> tuple[Tensor, Tensor]:
    filters = htk_filterbank(SAMPLE_RATE, N_FFT, MEL_BINS, FMIN, FMAX)
    with torch.inference_mode(False):
        return torch.hann_window(FRAME, dtype=torch.float64), torch.from_numpy(np.ascontiguousarray(filters.T))
