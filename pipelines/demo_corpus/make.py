"""Making the demo's corpus: which clips there are, in which layout and split, and all of them written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import soundfile

from pipelines.demo_corpus.layouts import Clip, sound_path, write_audiocaps, write_audioset, write_msd, write_speech, write_wavcaps
from pipelines.demo_corpus.sounds import KINDS, SAMPLE_RATE, Traits, make_clip
from pipelines.demo_corpus.speech import can_speak
from pipelines.demo_corpus.words import MUSIC
from stages.errors import UserError
from stages.files import write_json

CARD = "demo_corpus.json"  # written last: what the corpus was made with, and what it holds
FORMAT = 1
HELD_OUT = {"validation": 0.06, "test": 0.10}  # of every kind
UTTERANCES = 90


@dataclass(frozen=True)
class DemoCorpus:
    """What was made."""

    folder: str
    kinds: int
    recordings: dict[str, int]  # by corpus

    def __str__(self) -> str:
        return f"{sum(self.recordings.values())} recordings of {self.kinds} kinds of sound"


def make_demo_corpus(
    out: Path,
    seed: int = 0,
    clips_per_kind: int = 90,
    seconds: float = 2.56,
    kinds: Sequence[str] | None = None,
    speech: int | None = None,
    processes: int = 2,
) -> DemoCorpus:
    """Write the corpus to `out`; a finished one is left as it is.

    The same arguments give the same bytes, but for the spoken samples: espeak never says a thing quite the same way twice.

    Args:
        clips_per_kind: over all layouts; about 10 % test and 6 % validation.
        seconds: length of every sound; spoken sentences are shorter.
        kinds: labels of KINDS to make; None makes all.
        speech: utterances in each of the two speech layouts; 0 leaves them out. None makes 90, or leaves them out when
            espeak-ng is not installed.
        processes: that make sounds side by side.

    Raises:
        UserError: unknown kinds, another corpus in `out`, or no espeak-ng for the speech.
    """
    labels = list(KINDS if kinds is None else kinds)
    unknown = [label for label in labels if label not in KINDS]
    if unknown:
        raise UserError(f"unknown kinds of sound: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if speech is None:
        speech = UTTERANCES if can_speak() else 0
    made_with = {"format": FORMAT, "seed": seed, "clips_per_kind": clips_per_kind, "seconds": seconds, "kinds": labels, "speech": speech}
    card = out / CARD
    if card.is_file():
        there = json.loads(card.read_text(encoding="utf-8"))
        if there["made_with"] != made_with:
            raise UserError(f"{out} holds a demo corpus made with {there['made_with']}; delete it or choose another folder")
        return DemoCorpus(**there["made"])

    clips = [clip for label in labels for clip in _plan(label, clips_per_kind)]
    make = partial(_make_and_write, out=out, seed=seed, seconds=seconds)
    for folder in {sound_path(out, clip).parent for clip in clips}:
        folder.mkdir(parents=True, exist_ok=True)
    recordings: dict[str, int] = {}
    # Fresh processes: the caller may hold threads (torch, Ray), and those do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        spoken = pool.submit(write_speech, out, seed, speech, seconds) if speech else None
        traits = list(pool.map(make, clips, chunksize=50)) if processes > 1 and len(clips) > 200 else list(map(make, clips))
        if spoken is not None:
            recordings |= spoken.result()
    pairs = list(zip(clips, traits, strict=True))
    for corpus, write in (("wavcaps", write_wavcaps), ("audioset", write_audioset), ("audiocaps", write_audiocaps), ("msd", write_msd)):
        mine = [(clip, t) for clip, t in pairs if clip.corpus == corpus]
        if mine:
            write(out / corpus, mine, seed, seconds)
            recordings[corpus] = len(mine)
    made = DemoCorpus(str(out), len(labels), recordings)
    write_json(card, {"made_with": made_with, "made": asdict(made)})
    return made


def _plan(label: str, count: int) -> list[Clip]:
    """The clips of a kind, dealt to layouts and splits."""
    shares = {"wavcaps": 0.5, "msd": 0.5} if label in MUSIC else {"wavcaps": 0.66, "audioset": 0.22, "audiocaps": 0.12}
    clips: list[Clip] = []
    for corpus, share in shares.items():
        size = count - len(clips) if corpus == list(shares)[-1] else round(share * count)
        held = {split: round(part * size) for split, part in HELD_OUT.items()}
        if corpus == "audioset":  # it has no validation split
            held = {"validation": 0, "test": held["test"]}
        if corpus == "wavcaps" and size > 2:
            held = {split: max(1, n) for split, n in held.items()}
        splits = ["test"] * held["test"] + ["validation"] * held["validation"]
        splits += ["train"] * (size - len(splits))
        clips += [Clip(corpus, label, number, split) for number, split in enumerate(splits)]
    return clips


def _make_and_write(clip: Clip, out: Path, seed: int, seconds: float) -> Traits:
    waveform, traits = make_clip(clip.label, clip.rng(seed), seconds)
    soundfile.write(sound_path(out, clip), waveform, SAMPLE_RATE)
    return traits
