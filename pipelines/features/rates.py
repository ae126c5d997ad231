"""How fast this machine computes each pass: measured, and kept in `rates.json` of the work folder with the machine's name.

Only `Pass.encode` is timed, on clips at hand; what reading inputs and writing shards cost besides is in `benchmarks/`.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import cluster
from pipelines.features.passes import Features, Pass, Row
from stages.audio import AudioConfig, load_audio, log_mel, normalise, pad_or_cut, write_wav
from stages.base import stage_class
from stages.errors import UserError
from stages.files import Place
from stages.variants import Variant

FILE = "rates.json"
MADE_RATE = 44_100  # Hz of made recordings: most real ones have it, so decoding and resampling cost what they do there
MOST_AT_ONCE = 64  # clips that an encoder is given here
TEXTS = ("rain falls on a tin roof", "a dog barks twice while a car passes by", "slow piano music with a soft male voice")


@dataclass(frozen=True)
class Rate:
    """What was measured of one pass on one machine."""

    machine: str
    variant: str
    name: str  # of the pass
    clips_per_second: float  # of the whole machine
    clip_seconds: float
    device: str  # what computed it: "2 processes", or a GPU's name
    clips: str  # "made", or the folder they came from
    weights: str  # "random", "trained", or "none"
    seconds: float  # that the measuring took
    date: str

    @property
    def times_real(self) -> float:
        """Seconds of sound per second."""
        return self.clips_per_second * self.clip_seconds


def machine() -> str:
    """This machine in words: processor, cores, GPUs."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    have = cluster.this_machine()
    gpus = f", {have.gpus} x {torch.cuda.get_device_name()}" if have.gpus else ""
    return f"{have.cpus} cores of {model}{gpus}"


def read_rates(work: Path | Place) -> list[Rate]:
    """All rates kept in a work folder. Raises UserError for a file that holds something else."""
    path = Place.of(work) / FILE
    if not path.exists():
        return []
    try:
        return [Rate(**entry) for entry in json.loads(path.read())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and measure again with `loa plan --measure`") from None


def keep_rates(work: Path | Place, measured: Sequence[Rate]) -> None:
    """Put rates in the place of earlier ones of the same machine, variant and pass."""
    new = {(r.machine, r.variant, r.name) for r in measured}
    kept = [r for r in read_rates(work) if (r.machine, r.variant, r.name) not in new]
    content = json.dumps([asdict(r) for r in [*kept, *measured]], indent=2, ensure_ascii=False)
    (Place.of(work) / FILE).write((content + "\n").encode())


def rates_here(work: Path | Place, variant: str) -> dict[str, float]:
    """Clips per second of this machine by pass, as far as they were measured."""
    return {r.name: r.clips_per_second for r in read_rates(work) if r.machine == machine() and r.variant == variant}


def measure(chosen: Pass, variant: Variant, rows: Sequence[Row], seconds: float, clips: str, weights: str) -> Rate:
    """Time a pass for so many seconds on the rows of recordings: CPU passes in a process per core, encoders as one worker.

    Raises UserError when a clip cannot be encoded.
    """
    have = cluster.this_machine()
    if chosen.encoder:
        device = torch.device("cuda" if have.gpus else "cpu")
        rate = _timed(chosen, rows, seconds, device) * max(1, have.gpus)
        said = f"{have.gpus} x {torch.cuda.get_device_name()}" if have.gpus else f"1 process of {torch.get_num_threads()} threads"
    else:
        with multiprocessing.get_context("spawn").Pool(have.cpus) as pool:
            rate = sum(pool.starmap(_one_core, [(chosen, rows, seconds)] * have.cpus))
        said = f"{have.cpus} processes"
    date = time.strftime("%Y-%m-%d")
    return Rate(machine(), variant.name, chosen.name, round(rate, 3), variant.audio.clip_seconds, said, clips, weights, seconds, date)


def _one_core(chosen: Pass, rows: Sequence[Row], seconds: float) -> float:
    torch.set_num_threads(1)
    return _timed(chosen, rows, seconds, torch.device("cpu"))


def _timed(chosen: Pass, rows: Sequence[Row], seconds: float, device: torch.device) -> float:
    """Clips per second of `encode` in this process; the first call, which warms up, does not count: one clip is enough on a CPU."""
    chosen.load(device)
    batch = list(rows[: min(chosen.batch, MOST_AT_ONCE) if chosen.encoder else 8])
    features = [features_of(row, chosen) for row in batch]
    warm = len(batch) if device.type == "cuda" else 1
    _encoded(chosen, batch[:warm], features[:warm])
    done, started = 0, time.monotonic()
    while (spent := time.monotonic() - started) < seconds or not done:
        _encoded(chosen, batch, features)
        done += len(batch)
    return done / max(spent, time.monotonic() - started)


def _encoded(chosen: Pass, batch: Sequence[Row], features: Sequence[Features]) -> None:
    for row, outcome in zip(batch, chosen.encode(batch, features), strict=True):
        if not isinstance(getattr(outcome, "members", outcome), Mapping):
            raise UserError(f"the {chosen.name} pass cannot be measured on {row['path']}: {getattr(outcome, 'reason', outcome)}")


def features_of(row: Row, chosen: Pass) -> dict[str, np.ndarray]:
    """The input series of a clip, computed from its recording."""
    if not chosen.reads:
        return {}
    audio = chosen.audio
    waveform = pad_or_cut(normalise(load_audio(row["path"], audio.sample_rate, row["start"], row["seconds"])), audio.clip_samples)
    made = {"waveform": waveform, "mel": log_mel(torch.from_numpy(waveform)[None], audio)[0].numpy()}
    return {name: made[name] for name in chosen.reads}


def made_rows(folder: Path, audio: AudioConfig, count: int = MOST_AT_ONCE, recordings: int = 16) -> list[dict[str, Any]]:
    """Rows of `recordings` made in `folder`, noise under slow envelopes, one clip long; every row has a caption of its own."""
    rng, samples = np.random.default_rng(0), round(audio.clip_seconds * MADE_RATE)
    for i in range(recordings):
        envelope = np.abs(np.sin(2 * np.pi * rng.uniform(0.2, 2) * np.arange(samples) / MADE_RATE))
        write_wav(folder / f"{i}.wav", (0.2 * envelope * rng.standard_normal(samples)).astype(np.float32), MADE_RATE)
    texts = made_captions(count)
    return [row_of(str(folder / f"{i % recordings}.wav"), audio.clip_seconds, texts[i]) for i in range(count)]


def made_captions(count: int) -> list[str]:
    """So many different captions of twelve words, about as long as AudioCaps' are: the text pass encodes equal ones once."""
    rng, words = np.random.default_rng(0), sorted({word for text in TEXTS for word in text.split()})
    return [" ".join(rng.choice(words, 12)) for _ in range(count)]


def row_of(path: str, seconds: float, text: str) -> dict[str, Any]:
    """A row of the clip table, as far as passes read one."""
    return {"clip_id": "made", "path": path, "start": 0.0, "seconds": seconds, "captions": [text], "labels": [], "transcript": text}


class _Texts:
    """What tokenizers of random networks are made from."""

    def texts(self) -> Iterator[Mapping[str, Any]]:
        yield from (row_of("", 1.0, text) for text in TEXTS)


def random_weights(stage: str, variant: Variant, folder: Path) -> Path:
    """A stage with random weights: as fast as a trained one. Returns its folder."""
    cls = stage_class(stage)
    for name in ("prepared", stage):
        (folder / name).mkdir(parents=True, exist_ok=True)
    cls.prepare(variant, lambda name: folder / name, _Texts(), folder / "prepared")  # type: ignore[arg-type]
    cls.build(variant, lambda name: folder / name).save(folder / stage)
    return folder / stage
