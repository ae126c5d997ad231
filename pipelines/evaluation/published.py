"""Scores that papers print for their systems. Nothing here was measured by loa, and nothing here may be compared field by field.

Transcribed from "AudioLDM 2: Learning Holistic Audio Generation With Self-Supervised Pretraining" (arXiv 2308.05734); None where the
paper gives no value. A value in `uncertain` lost a leading digit in the copy that was transcribed and is a likely reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = float | str | None


@dataclass(frozen=True)
class PublishedTable:
    """One table of a paper."""

    title: str
    columns: tuple[str, ...]  # as printed, with arrows
    rows: Mapping[str, tuple[Value, ...]]  # system -> values
    metrics: tuple[str, ...]  # loa's names of the measures it is set beside
    uncertain: frozenset[tuple[str, str]] = frozenset()  # (system, column)
    notes: tuple[str, ...] = ()


CAPTIONED = ("fad", "kl_passt", "clap_score")
JUDGED_BY = "FAD by VGGish, KL(real ‖ generated) by PaSST, CLAP score by a LAION CLAP that the paper does not name"

TABLES: dict[str, PublishedTable] = {
    "II": PublishedTable(
        "AudioLDM 2, Table II: sound from the captions of AudioCaps",
        ("hours", "parameters", "FAD ↓", "KL ↓", "CLAP ↑", "OVL ↑", "REL ↑"),
        {
            "GroundTruth": (None, None, None, None, 0.251, 4.04, 4.08),
            "GT-AudioMAE": (None, None, 1.84, 0.19, 0.239, 3.87, 4.02),
            "AudioGen-Large": (6824, "1B", 1.82, 1.69, None, None, None),
            "Make-an-Audio": (3000, "453M", 2.66, 1.61, None, None, None),
            "AudioLDM-Large": (9031, "739M", 1.96, 1.59, None, None, None),
            "AudioLDM-M": (9031, "416M", 4.53, 1.99, 0.141, 3.61, 3.55),
            "Make-an-Audio 2": (3700, "937M", 2.05, 1.27, 0.173, 3.68, 3.62),
            "TANGO, AudioCaps only": (145, "866M", 1.73, 1.27, 0.176, 3.75, 3.72),
            "AudioLDM 2-AC": (145, "346M", 1.67, 1.01, 0.249, 3.88, 3.90),
            "AudioLDM 2-Full": (29510, "346M", 1.78, 1.60, 0.191, 3.83, 3.77),
            "AudioLDM 2-AC-Large": (145, "712M", 1.42, 0.98, 0.243, 3.89, 3.87),
            "AudioLDM 2-Full-Large": (29510, "712M", 1.86, 1.64, 0.182, 3.79, 3.80),
        },
        CAPTIONED,
        frozenset({("GT-AudioMAE", "FAD ↓"), ("AudioLDM 2-Full-Large", "FAD ↓")}),
        (JUDGED_BY, "OVL and REL are listening tests, 1 to 5"),
    ),
    "III": PublishedTable(
        "AudioLDM 2, Table III: music from the captions of MusicCaps, at 16 kHz",
        ("FAD ↓", "KL ↓", "CLAP ↑", "OVL ↑", "REL ↑"),
        {
            "GroundTruth": (None, None, 0.253, 3.82, 4.26),
            "GT-AudioMAE": (2.18, 0.27, 0.257, 3.59, 3.92),
            "Riffusion": (14.80, 2.06, 0.190, None, None),
            "Mousai": (7.50, 1.59, None, None, None),
            "MeLoDy": (5.41, None, None, None, None),
            "MusicLM": (4.00, None, None, None, None),
            "MusicGen-Medium, reported": (3.4, 1.23, 0.320, None, None),
            "MusicGen-Medium, reproduced": (4.89, 1.35, 0.291, 3.37, 3.38),
            "AudioLDM-M, reproduced": (3.20, 1.29, 0.360, 3.03, 3.25),
            "AudioLDM 2-MSD": (4.47, 1.32, 0.294, 3.41, 3.30),
            "AudioLDM 2-Full": (3.13, 1.20, 0.301, 3.34, 3.54),
        },
        CAPTIONED,
        notes=(JUDGED_BY, "AudioLDM-M is conditioned by a CLAP like the one that scores, which raises its CLAP score"),
    ),
    "IV": PublishedTable(
        "AudioLDM 2, Table IV: speech from the transcripts of LJSpeech's test split",
        ("MOS ↑", "±"),
        {
            "GroundTruth": (4.63, 0.08),
            "GT-AudioMAE": (None, 0.13),
            "FastSpeech2": (3.78, 0.15),
            "AudioLDM 2-LJS": (3.65, None),
            "AudioLDM 2-LJS-Pretrained": (4.00, None),
        },
        ("wer", "cer"),
        notes=("MOS is a listening test of naturalness, 1 to 5; word error rates were not published",),
    ),
    "V": PublishedTable(
        "AudioLDM 2, Table V: what AudioLDM 2-AC loses without one of its parts, AudioCaps",
        ("FAD ↓", "KL ↓", "CLAP ↑"),
        {
            "AudioLDM 2": (1.67, 1.01, 0.249),
            "no joint finetuning": (2.24, 1.07, 0.234),
            "no CLAP embedding (GPT)": (2.48, 1.07, 0.245),
            "no FLAN-T5 embedding (GPT)": (2.73, 1.05, 0.250),
            "no FLAN-T5 cross-attention (T-UNet)": (1.38, 1.30, 0.211),
            "no CLAP and no FLAN-T5 (GPT)": (2.11, 1.06, 0.213),
        },
        CAPTIONED,
        frozenset({("no FLAN-T5 embedding (GPT)", "KL ↓")}),
        (JUDGED_BY,),
    ),
}
