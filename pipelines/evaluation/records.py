"""What a score is worth: the record of how it came about, and the rule that only equal protocols stand side by side.

The same public system has been published with a FAD of 1.78, 2.18 and 3.39: a number without its protocol says nothing.
So every score is written with everything that changes it besides the system (references.md#comparability), and scores
that differ in any of it are not compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.files import Place, digest, write_json

RECORD_FORMAT = 1
SILENT_LIMIT = 0.01  # above this share of silent clips a system is not ranked: distances can look good for silence


# ------------------------------------------------------------------------------------------------------ measures


@dataclass(frozen=True)
class Measure:
    """What a score is called, and which way is good."""

    title: str
    better: str  # "higher" or "lower"
    form: str = "{:.3f}"
    about: str = ""

    @property
    def heading(self) -> str:
        """The title with the arrow of tables."""
        return f"{self.title} {'↑' if self.better == 'higher' else '↓'}"


def _cnn14_measures(suffix: str, rate: str) -> dict[str, Measure]:
    return {
        f"fd{suffix}": Measure(f"FD{rate}", "lower", "{:.2f}", "Fréchet distance of CNN14 embeddings, one per clip"),
        f"inception_score{suffix}": Measure(f"IS{rate}", "higher", "{:.2f}", "of CNN14's classes, ten parts, shuffle seed 2020"),
        f"kl_panns{suffix}": Measure(f"KL, CNN14{rate}", "lower", "{:.2f}", "KL(real ‖ generated), softmax, clip by clip"),
        f"kl_sigmoid_panns{suffix}": Measure(f"KL sigmoid, CNN14{rate}", "lower", "{:.2f}", "the same sum over sigmoids; may be negative"),
    }


# In the order of tables. Those of the published judges come first; `loa evaluate` alone measures with what training left.
MEASURES = {
    "fad": Measure("FAD", "lower", "{:.2f}", "Fréchet distance of VGGish embeddings, windows of 0.96 s side by side"),
    "fad_google": Measure("FAD, Google's windows", "lower", "{:.2f}", "windows of 1 s every 0.5 s, level raised"),
    "fad_infinity": Measure("FAD∞", "lower", "{:.2f}", "FAD extrapolated to infinitely many clips"),
    **_cnn14_measures("", ""),
    **_cnn14_measures("_32k", ", 32 kHz"),
    "kl_passt": Measure("KL, PaSST", "lower", "{:.2f}", "KL(real ‖ generated), softmax, clip by clip"),
    "accuracy": Measure(
        "Recognised by the classifier", "higher", "{:.1%}", "share of clips whose class a classifier trained on real clips names"
    ),
    "kl": Measure("KL to the real clip", "lower", "{:.2f}", "KL(real ‖ generated) of the classifier's probabilities, clip by clip"),
    "frechet_classifier": Measure(
        "Fréchet distance, classifier", "lower", "{:.2f}", "between sets of classifier embeddings, to the real clips"
    ),
    "frechet_clap": Measure(
        "Fréchet distance, CLAP", "lower", "{:.3f}", "FAD-CLAP: between sets of CLAP audio embeddings, to the real clips"
    ),
    "clap_score": Measure("CLAP score", "higher", "{:.3f}", "mean cosine of caption and clip; chance: captions of other classes"),
    "mel_l1": Measure("Mel distance", "lower", "{:.3f}", "mean |Δ| of log-mel spectrograms, nepers"),
    "mel_psnr": Measure("Mel PSNR", "higher", "{:.1f}", "of log-mel pictures from -80 to 20 dB, in dB"),
    "mel_ssim": Measure("Mel SSIM", "higher", "{:.3f}", "of the same pictures"),
    "log_spectral_distance": Measure("Log-spectral distance", "lower", "{:.2f}", "of log10 power"),
    "spectral_convergence": Measure("Spectral convergence", "lower", "{:.3f}", "three resolutions"),
    "log_magnitude": Measure("Log-magnitude distance", "lower", "{:.3f}", "three resolutions, nepers"),
    "wer": Measure("Word error rate", "lower", "{:.1%}", "of what speech recognition reads, over all words"),
    "cer": Measure("Character error rate", "lower", "{:.1%}", "of what speech recognition reads, over all characters"),
    "silent": Measure("Silent clips", "lower", "{:.1%}", "RMS below -60 dBFS"),
}


# ------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Score:
    """A value of a measure, and what of its protocol the formula decides: implementation, rows, pairing, direction, …"""

    metric: str  # a name of MEASURES
    value: float
    fields: Mapping[str, Any]
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what comes with the value, such as a deviation


@dataclass(frozen=True)
class Protocol:
    """Everything that changes a score besides the system. None: it does not apply, or nobody said."""

    metric: str  # a name of MEASURES
    implementation: str  # which formula, in words
    judge: str | None  # the network that embedded the clips
    judge_sha256: str | None
    sample_rate: int | None  # Hz, as judged
    resampler: str
    channels: str
    level: str
    clip_rule: str  # how lengths are made equal
    num_generated: int  # clips
    rows_generated: int  # embeddings; frames where a judge hears a clip in several
    num_reference: int | None
    rows_reference: int | None
    pairing: str
    direction: str | None  # of KL
    ddof: int | None  # of covariances and deviations
    dtype: str
    seed: int | None  # of the metric's own shuffles and draws
    captions_sha256: str | None
    references_sha256: str | None  # names and contents of the real clips
    candidates: int | None  # how many were generated for a caption, of which the ranker took one
    ranker: str | None

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """The fields in which two protocols differ, with both values."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}


@dataclass(frozen=True)
class Record:
    """One score of one system. `made` belongs to the system, so it may differ between those that are compared."""

    system: str
    value: float
    protocol: Protocol
    made: Mapping[str, Any]  # weights_sha256, guidance_scale, num_inference_steps, scheduler, seed, generated_sha256
    check: Mapping[str, int]  # clips, and how many of them are silent, clipped, short
    code_version: str
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what comes with the value, such as a deviation
    ranked: bool = True  # False for what stands beside systems to read them against: real clips, restored ones
    format: int = RECORD_FORMAT

    def __post_init__(self) -> None:
        if self.protocol.metric not in MEASURES:
            raise UserError(f"{self.protocol.metric!r} is no metric of this version of loa; there are {', '.join(MEASURES)}")
        if not math.isfinite(self.value):
            raise UserError(f"{self.protocol.metric} of {self.system} is {self.value}, which is no score")

    @property
    def measure(self) -> Measure:
        """How its metric is called and shown."""
        return MEASURES[self.protocol.metric]

    @property
    def silent_share(self) -> float:
        """Share of the system's clips that are silent."""
        return self.check.get("silent", 0) / max(1, self.check.get("clips", 1))


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """One JSON file per score, named by system and metric; files of earlier evaluations in the folder go."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = set()
    for record in records:
        plain = "".join(c if c.isalnum() or c in "-." else "_" for c in record.system)
        path = folder / f"{record.protocol.metric}.{plain}-{digest(record.system, 6)}.json"
        write_json(path, dataclasses.asdict(record))
        written.add(path.name)
    for path in folder.glob("*.json"):
        if path.name not in written:
            path.unlink()


def read_records(source: str | Path | Place) -> list[Record]:
    """The records of a file, of a folder of them, or of a project or evaluation folder, in the order of their names.

    Raises:
        UserError: there are none, or a file is no record of this format.
    """
    source = _records_here(Place.of(source))
    folders = (source, source / "records", source / "evaluation" / "records")
    paths = [source] if source.is_file() else next((files for f in folders if (files := _record_files(f))), [])
    if not paths:
        raise UserError(f"{source} holds no records of scores; `loa evaluate` writes them to a folder named records")
    return [_read_record(path) for path in paths]


def _records_here(source: Place) -> Path:
    """`source`, or of one behind a URL a local copy of what holds its records: a project has much else."""
    inner = next((at for at in (source / "evaluation" / "records", source / "records") if at.exists()), source)
    if source.local:
        return source.path
    try:
        return inner.local_copy()
    except FileNotFoundError:
        raise UserError(f"there is nothing at {source}; name a record, a folder of records, or a project") from None


def _record_files(folder: Path) -> list[Path]:
    """JSON files named like records: <metric>.<system>.json."""
    return sorted(path for path in folder.glob("*.*.json") if path.name.partition(".")[0] in MEASURES)


def _read_record(path: Path) -> Record:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != RECORD_FORMAT:
            raise UserError(f"{path} has format {values.get('format')}, this version of loa reads {RECORD_FORMAT}; evaluate again")
        return Record(**(values | {"protocol": Protocol(**values["protocol"])}))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of a score as `loa evaluate` writes it ({error})") from error


# ---------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """Systems as rows, metrics as columns; all values of a column were measured by one protocol."""

    metrics: tuple[str, ...]
    systems: tuple[str, ...]
    records: Mapping[tuple[str, str], Record]  # (system, metric)
    unranked: tuple[str, ...]  # systems with too many silent clips

    def best(self, metric: str) -> set[str]:
        """The systems with the best value of a metric, among those that are ranked; none where there is nothing to compare."""
        there = [s for s in self.systems if s not in self.unranked and (s, metric) in self.records]
        ranked = [s for s in there if self.records[s, metric].ranked]
        values = {s: MEASURES[metric].form.format(self.records[s, metric].value) for s in ranked}  # a tie is what a reader sees
        if len(ranked) < 2:
            return set()
        choose = max if MEASURES[metric].better == "higher" else min
        first = choose(ranked, key=lambda s: self.records[s, metric].value)
        return {s for s in ranked if values[s] == values[first]}


def side_by_side(records: Sequence[Record]) -> Comparison:
    """Put scores side by side that were measured alike.

    Raises:
        UserError: two scores of a metric come from different protocols (the message names the fields and both values),
            or one system has two scores of a metric.
    """
    if not records:
        raise UserError("there are no scores to compare")
    table: dict[tuple[str, str], Record] = {}
    for record in records:
        key = record.system, record.protocol.metric
        known = table.setdefault(key, record)
        # The same clips may be in several folders, such as the real ones; machines round differently.
        alike = (known.protocol, known.made) == (record.protocol, record.made) and math.isclose(known.value, record.value, rel_tol=1e-6)
        if not alike:
            raise UserError(
                f"{record.system} has two scores of {record.protocol.metric}, {known.value:.6g} and {record.value:.6g}"
                f"{_in_words(known.protocol.differences(record.protocol))}; give the systems different names with `loa evaluate --name`"
            )
    for metric in MEASURES:
        column = [record for (_, name), record in table.items() if name == metric]
        for record in column[1:]:
            if differing := column[0].protocol.differences(record.protocol):
                raise UserError(
                    f"{metric} of {column[0].system} and of {record.system} were not measured alike{_in_words(differing)}; "
                    "evaluate both by one protocol, or compare them with their own kind only"
                )
    systems = tuple(dict.fromkeys(system for system, _ in table))
    there = tuple(metric for metric in MEASURES if any(name == metric for _, name in table))
    silent = {record.system for record in table.values() if record.silent_share > SILENT_LIMIT}
    return Comparison(there, systems, table, tuple(s for s in systems if s in silent))


def _in_words(differences: Mapping[str, tuple[Any, Any]]) -> str:
    def short(value: Any) -> str:
        text = "not stated" if value is None else str(value)
        return text if len(text) < 64 else text[:12] + "…"

    listed = ", ".join(f"{name} ({short(mine)} against {short(theirs)})" for name, (mine, theirs) in differences.items())
    return f": they differ in {listed}" if listed else ""
