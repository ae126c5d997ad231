"""The passes of preprocessing as Ray Data callables: each turns the clips of one shard into members of a series.

A unit of work is a shard, and what becomes of it depends on the shard alone (of encoders, up to the rounding of a
worker's device and threads), so a pass may be stopped anywhere, repeated, and spread over any number of workers.
Features travel through the store's files; Ray only carries shard numbers and counts.
"""

from __future__ import annotations

import collections
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from options import plain_sentence
from pipelines import cluster
from pipelines.features.shards import Member, ShardWriter
from pipelines.features.store import FeatureStore
from stages.audio import AudioConfig, encode_flac, fbank, load_audio, log_mel, normalise, pad_or_cut
from stages.errors import AudioError, UserError
from stages.files import code_version, weights_hash
from stages.text import clip_texts

SILENCE = 1e-4  # a clip whose samples all lie below is rejected
ATTEMPTS = 2  # at a shard whose worker process dies
REMOTE_ATTEMPTS = 3  # at a recording behind a URL

Row = Mapping[str, Any]
Features = Mapping[str, np.ndarray]
Outcome = dict[str, dict[str, Member]] | str  # members by series, or why the clip is rejected
Encode = Callable[[Sequence[Row], Sequence[Features]], list[Outcome]]
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------- the passes


class Pass:
    """What one pass makes of clips. It is pickled to the workers with its settings; `load` fetches weights there."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()  # series whose features `encode` is given
    encoder: ClassVar[str] = ""  # the stage whose weights it needs; without one it runs as stateless CPU tasks
    weights: ClassVar[tuple[str, ...]] = ("",)  # folders of that stage's release that the pass reads
    batch: int = 1  # clips per call of `encode`

    def __init__(self, audio: AudioConfig, folder: Path | None = None) -> None:
        self.audio, self.folder = audio, folder
        self.device = torch.device("cpu")

    @property
    def series(self) -> tuple[str, ...]:
        """The series it writes."""
        return (self.name,)

    def recipe(self, series: str) -> dict[str, Any]:
        """What identifies the data of a series, and under "provenance" what merely made it."""
        recipe: dict[str, Any] = {"format": 1, "audio": self.audio.to_dict(), "provenance": {"code": code_version()}}
        if self.folder is not None:
            recipe |= {
                "encoder": self.encoder,
                "weights": {part or self.encoder: weights_hash(self.folder / part) for part in self.weights},
            }
        return recipe

    def wants(self, row: Row) -> bool:
        """Whether a clip belongs into the series at all."""
        return True

    def load(self, device: torch.device) -> None:
        """Called once per worker, before the first `encode`."""
        self.device = device

    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        """The members of a batch of clips, one outcome per clip."""
        raise TypeError(f"{type(self).__name__} does not encode")

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where the device is built for it; elsewhere full precision, so that laptops agree to the last bit."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


class MelPass(Pass):
    """Recordings → normalised waveform (FLAC) and log-mel spectrogram of every clip."""

    name = "mel"

    @property
    def series(self) -> tuple[str, ...]:
        return ("mel", "waveform")

    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> Outcome:
        try:
            waveform = read_recording(row["path"], self.audio.sample_rate, row["start"], row["seconds"])
            if np.abs(waveform).max() <= SILENCE:
                return "silent"
            waveform = pad_or_cut(normalise(waveform), self.audio.clip_samples)
            mel = log_mel(torch.from_numpy(waveform)[None], self.audio)[0]
            return {
                "mel": {"mel.npy": _half(mel)},
                "waveform": {"waveform.flac": encode_flac(waveform, self.audio.sample_rate)},
            }
        except (AudioError, OSError, RuntimeError, MemoryError) as error:
            return str(error) if isinstance(error, AudioError) else f"{type(error).__name__}: {error}"


class LoaPass(Pass):
    """Waveforms → the language of audio: AudioMAE features pooled at every λ asked for, from one forward."""

    name, reads, encoder = "loa", ("waveform",), "audiomae"

    def __init__(self, audio: AudioConfig, folder: Path, poolings: Sequence[int]) -> None:
        super().__init__(audio, folder)
        self.poolings = tuple(sorted(set(poolings)))
        self.batch = 16

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(f"loa-{pooling}" for pooling in self.poolings)

    def recipe(self, series: str) -> dict[str, Any]:
        return super().recipe(series) | {"pooling": int(series.removeprefix("loa-"))}

    def load(self, device: torch.device) -> None:
        from stages.audiomae.model import AudioMAE

        super().load(device)
        assert self.folder is not None
        self.network = AudioMAE.load(self.folder).to(device)

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        from stages.audiomae.model import pool_loa

        frames = fbank(_stack(clips, "waveform", self.device), self.audio)
        with self.autocast():
            features = self.network.features(frames)
        pooled = {p: _half(pool_loa(features.float(), self.network.config.grid, p)) for p in self.poolings}
        return [_checked({f"loa-{p}": {"loa.npy": loa[i]} for p, loa in pooled.items()}) for i in range(len(rows))]


class LatentPass(Pass):
    """Log-mel spectrograms → mean and standard deviation of the VAE's posterior, unscaled."""

    name, reads, encoder, weights = "latent", ("mel",), "vae", ("vae",)
    batch = 8

    def load(self, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        super().load(device)
        assert self.folder is not None
        self.network = AutoencoderKL.from_pretrained(self.folder / "vae").to(device).eval()

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        mel = _stack(clips, "mel", self.device)[:, None]
        with self.autocast():
            moments = self.network.encode(mel).latent_dist.parameters
        mean, log_variance = moments.float().chunk(2, dim=1)
        latents = _half(torch.cat([mean, (log_variance.clamp(-30.0, 20.0) / 2).exp()], dim=1))
        return [_checked({"latent": {"latent.npy": latent}}) for latent in latents]


class ClapPass(Pass):
    """What the passes by the towers of CLAP and T5 share: loading them."""

    encoder = "clap"

    def load(self, device: torch.device) -> None:
        from stages.frozen import TextEncoders

        super().load(device)
        assert self.folder is not None
        self.network = TextEncoders.load(self.folder, device)


class TextPass(ClapPass):
    """Captions (or labels) → CLAP embeddings and T5 states of all texts of a clip."""

    name, weights = "text", ("text_encoder", "text_encoder_2")
    batch = 256
    texts_at_once = 32

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        texts = [clip_texts(row) for row in rows]
        known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # Equal texts once (labels repeat), short ones together (padding costs as much as words).
        for chunk in _chunks(sorted({text for group in texts for text in group}, key=lambda text: (len(text), text)), self.texts_at_once):
            with self.autocast():
                clap, (states, mask) = self.network.clap_text(chunk), self.network.t5(chunk)
            lengths = mask.sum(1).tolist()
            for text, embedding, state, length in zip(chunk, _half(clap), _half(states), lengths, strict=True):
                known[text] = embedding, state[:length]
        return [_checked({"text": _text_members([known[text] for text in group])}) for group in texts]


class SpeechPass(ClapPass):
    """Spoken clips → the speaker's CLAP embedding and the phonemes of the transcript. Clips without one are left out."""

    name, reads, weights = "speech", ("waveform",), ("text_encoder",)
    batch = 16

    def __init__(self, audio: AudioConfig, folder: Path, max_phonemes: int) -> None:
        super().__init__(audio, folder)
        self.max_phonemes = max_phonemes

    def recipe(self, series: str) -> dict[str, Any]:
        return super().recipe(series) | {"max_phonemes": self.max_phonemes}

    def wants(self, row: Row) -> bool:
        return bool(row["transcript"])

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        from stages.phonemes import phoneme_ids

        with self.autocast():
            voices = _half(self.network.clap_audio(_stack(clips, "waveform", self.device), self.audio.sample_rate))
        ids = [phoneme_ids(row["transcript"], self.max_phonemes) for row in rows]
        return [
            _checked({"speech": {"clap_audio.npy": voice, "phonemes.npy": phonemes}}) for voice, phonemes in zip(voices, ids, strict=True)
        ]


def read_recording(path: str, sample_rate: int, start: float, seconds: float) -> np.ndarray:
    """The samples of a clip, [T] float32; a recording behind a URL gets several attempts."""
    if "://" not in path:
        return load_audio(path, sample_rate, start, seconds)
    for attempt in range(1, REMOTE_ATTEMPTS + 1):
        try:
            with fsspec.open(path, "rb") as file:
                return load_audio(file.read(), sample_rate, start, seconds)
        except FileNotFoundError:
            raise AudioError(f"{path} does not exist") from None
        except OSError:
            if attempt == REMOTE_ATTEMPTS:
                raise
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def _stack(clips: Sequence[Features], name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([clip[name] for clip in clips])).to(device).float()


def _half(values: Tensor) -> np.ndarray:
    halves: np.ndarray = values.detach().half().cpu().numpy()
    return halves


def _checked(members: dict[str, dict[str, Member]]) -> Outcome:
    """The members, unless an encoder left numbers that would poison a training."""
    for group in members.values():
        for name, value in group.items():
            if isinstance(value, np.ndarray) and not np.isfinite(value).all():
                return f"{name} is not finite in half precision"
    return members


def _text_members(texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Member]:
    """K texts of a clip side by side, T5 states padded with zeros to the longest."""
    lengths = np.array([len(states) for _, states in texts], np.int16)
    padded = np.zeros((len(texts), int(lengths.max()), texts[0][1].shape[1]), np.float16)
    for place, (_, states) in zip(padded, texts, strict=True):
        place[: len(states)] = states
    return {"clap_text.npy": np.stack([clap for clap, _ in texts]), "t5.npy": padded, "t5_length.npy": lengths}


# ------------------------------------------------------------------------------------------------- one shard, one call


@dataclass(frozen=True)
class Unit:
    """A shard to be made: which of the pass's series lack it."""

    shard: int
    series: tuple[str, ...]
    clips: int  # of the clip table


def make_shard(store: FeatureStore, work: Pass, unit: Unit, encode: Encode) -> dict[str, Any]:
    """Encode the clips of one shard and write it; returns how many clips were kept and why others were not."""
    rows = [row for row in store.shard_rows(unit.shard) if work.wants(row)]
    reader = store.reader(work.reads, [unit.shard]) if work.reads else None
    if reader is not None:
        rows = [row for row in rows if row["clip_id"] in reader]  # the others were rejected, with a reason, before
    kept, reasons = 0, []
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(4))
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        writers = [stack.enter_context(store.shard_writer(series, unit.shard)) for series in unit.series]

        def batches() -> Iterator[tuple[list[dict[str, Any]], list[Features]]]:
            for batch in _chunks(rows, work.batch):
                yield batch, list(threads.map(reader.read, [row["clip_id"] for row in batch])) if reader else [{} for _ in batch]

        for batch, clips in _lookahead(batches(), ahead):
            for row, outcome in zip(batch, encode(batch, clips), strict=True):
                if isinstance(outcome, str):
                    reasons.append(outcome)
                else:
                    kept += 1
                _put(writers, row["clip_id"], outcome)
    return {"shard": unit.shard, "kept": kept, "reasons": json.dumps(reasons), "sentence": "", "failure": ""}


def _put(writers: Iterable[ShardWriter], clip_id: str, outcome: Outcome) -> None:
    for writer in writers:
        if isinstance(outcome, str):
            writer.reject(clip_id, outcome)
        else:
            writer.add(clip_id, outcome[writer.series])


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def _lookahead(items: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """The same items, each fetched while its predecessor is in use."""
    done = object()
    waiting = pool.submit(next, items, done)
    while (item := waiting.result()) is not done:
        waiting = pool.submit(next, items, done)
        yield item  # type: ignore[misc]


class ShardWorker:
    """The Ray Data callable: a row names a shard, the answer says what became of it.

    Ray Data repeats a row whose process dies, and drops it in the end; so an error of ours must not look like a death:
    it comes back as text, and the driver raises it.
    """

    def __init__(self, store: FeatureStore, work: Pass, threads: int) -> None:
        self.store, self.work, self.threads, self.loaded = store, work, threads, False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(row["shard"], tuple(json.loads(row["series"])), row["clips"])
        try:
            if not self.loaded:
                torch.set_num_threads(self.threads)
                self.work.load(torch.device("cuda" if torch.cuda.is_available() and self.work.encoder else "cpu"))
                self.loaded = True
            return make_shard(self.store, self.work, unit, self.work.encode)
        except Exception as error:
            return {
                "shard": unit.shard, "kept": 0, "reasons": "[]",
                "sentence": plain_sentence(error) or "", "failure": traceback.format_exc(),
            }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the whole pass


@dataclass
class PassReport:
    """What a pass did."""

    name: str
    clips: int = 0
    rejected: int = 0
    seconds: float = 0.0
    shards_done: int = 0
    shards_skipped: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)

    def sentence(self) -> str:
        """The report as a line for people."""
        if not self.shards_done:
            return f"{self.name}: nothing to do, all {self.shards_skipped} shards exist"
        rate = self.clips / max(self.seconds, 1e-9)
        skipped = f" ({self.shards_skipped} existed)" if self.shards_skipped else ""
        line = f"{self.name}: {self.clips} clips in {self.shards_done} shards{skipped}, {self.seconds:.1f} s, {rate:.1f} clips/s"
        if self.rejected:
            common = "; ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common(3))
            line += f"; {self.rejected} rejected: {common}" + (" …" if len(self.reasons) > 3 else "")
        return line


def execute(
    work: Pass, store: FeatureStore, *, workers: int | None = None, limit_shards: int | None = None, progress: bool = True
) -> PassReport:
    """Make the shards of a pass that the store lacks, on the joined Ray cluster.

    Args:
        workers: how many shards at once; by default what the cluster has room for.
        limit_shards: make at most this many shards, the first missing ones.
        progress: show a bar on stderr.

    Raises:
        UserError: the store's audio settings or the recipe of a series differ, an input series is incomplete, or the
            workers of an encoder keep dying.
    """
    started = time.monotonic()
    store.require_audio(work.audio, f"the {work.name} pass")
    for series in work.series:
        store.begin_series(series, work.recipe(series))
    missing = {series: set(store.missing_shards(series)) for series in work.series}
    wanted = sorted(set().union(*missing.values()))
    report = PassReport(work.name, shards_skipped=store.num_shards - len(wanted))
    units = [
        Unit(shard, tuple(series for series in work.series if shard in missing[series]), store.shard_count(shard))
        for shard in wanted[:limit_shards]
    ]
    if work.reads and units:
        store.reader(work.reads, [unit.shard for unit in units])  # refuses now, not on a worker
    with _bar(work, units, progress) as bar:
        for outcome in _outcomes(store, work, units, workers):
            _raise_failure(outcome)
            reasons = json.loads(outcome["reasons"])
            report.shards_done += 1
            report.clips += outcome["kept"]
            report.rejected += len(reasons)
            report.reasons.update(_gist(reason) for reason in reasons)
            bar.update(store.shard_count(outcome["shard"]))
            bar.set_postfix_str(f"{report.shards_done}/{len(units)} shards, {report.rejected} rejected", refresh=False)
    report.seconds = time.monotonic() - started
    return report


def _outcomes(store: FeatureStore, work: Pass, units: Sequence[Unit], workers: int | None) -> Iterator[dict[str, Any]]:
    """What became of every unit, as they finish. Without an encoder, units whose worker keeps dying are done under guard."""
    if not units:
        return
    resources = cluster.cluster_resources()
    pool = (cluster.encoder_pool if work.encoder else cluster.cpu_pool)(resources, len(units), workers)
    finished = set()
    for outcome in _on_ray_data(store, work, units, pool):
        finished.add(outcome["shard"])
        yield outcome
    for unit in units:
        if unit.shard not in finished:
            yield make_shard(store, work, unit, _guarded(work))


def _on_ray_data(store: FeatureStore, work: Pass, units: Sequence[Unit], pool: cluster.Pool) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    rows = [{"shard": unit.shard, "series": json.dumps(unit.series), "clips": unit.clips} for unit in units]
    worker = ShardWorker(store, work, pool.threads)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block is one shard: lost without an encoder only when its process died, and then done again under guard.
    context.max_errored_blocks = 0 if work.encoder else -1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a worker that dies is counted here, not told there
    with DataContext.current(context), warnings.catch_warnings():
        # The limits of retries have no named parameters yet; without them a row that kills its process comes back for ever.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if work.encoder:
            dataset = dataset.map(
                ShardWorker,
                fn_constructor_args=(store, work, pool.threads),
                compute=ActorPoolStrategy(size=pool.size),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                max_restarts=ATTEMPTS - 1,
                max_task_retries=ATTEMPTS - 1,
            )
        else:
            dataset = dataset.map(lambda row: worker(row), compute=TaskPoolStrategy(size=pool.size), num_cpus=1, max_retries=ATTEMPTS - 1)
    try:
        yield from dataset.iter_rows()
    except ExecutionTimeoutError as error:
        raise UserError(
            f"the {work.name} pass is stalled: {pool.size} workers of {pool.num_cpus:g} CPUs and {pool.num_gpus:g} GPUs never started, or "
            "a shard takes longer than RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S; free the cluster, or give --workers or a longer time"
        ) from error
    except RayError as error:
        raise UserError(
            f"a worker of the {work.name} pass died {ATTEMPTS} times ({type(error).__name__}), most often for lack of memory; "
            f"finished shards are kept: try again with --workers {max(1, pool.size // 2)} or a larger machine"
        ) from error


def _guarded(work: Pass) -> Encode:
    """`work.encode` with every clip in a process of its own: one that dies costs its own clip alone."""
    import ray
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    @ray.remote(num_cpus=1, max_retries=0)
    def encode_one(row: Row, clip: Features) -> list[Outcome]:
        torch.set_num_threads(1)  # as in ShardWorker: the sums, and so the bytes, are the same
        return work.encode([row], [clip])

    def encode(rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for row, clip in zip(rows, clips, strict=True):
            try:
                outcomes += ray.get(encode_one.remote(row, clip))
            except (WorkerCrashedError, OutOfMemoryError) as error:
                outcomes.append(f"its decoder died ({type(error).__name__})")
        return outcomes

    return encode


def _raise_failure(outcome: Mapping[str, Any]) -> None:
    if outcome["sentence"]:
        raise UserError(outcome["sentence"])
    if outcome["failure"]:
        raise RuntimeError(f"shard {outcome['shard']} failed on a worker:\n{outcome['failure']}")


def _gist(reason: str) -> str:
    """A reason without the recording it is about, for counting."""
    return " ".join(word for word in reason.split() if "/" not in word and not any(c.isdigit() for c in word))


def _bar(work: Pass, units: Sequence[Unit], progress: bool) -> Any:
    quiet = not progress or not units
    patience = 0.5 if sys.stderr.isatty() else 30.0  # seconds between lines
    return tqdm(total=sum(unit.clips for unit in units), desc=work.name, unit="clip", disable=quiet, mininterval=patience)
