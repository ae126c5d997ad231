"""What every trainable thing of loa has in common: the Stage contract, its recipe, its released folder."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from stages.variants import Variant

STAGE_FORMAT = 1


class UserError(ValueError):
    """A mistake the user can mend: the message says what was given, what was expected and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a stage is optimised. Rates are per optimiser step; `global_batch` counts clips over all workers."""

    steps: int
    global_batch: int
    learning_rate: float
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8  # Adam divides by sqrt(second moment) + epsilon
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "constant"  # after the warm-up: "constant", "linear" or "cosine" down to zero
    clip_norm: float | None = 1.0
    micro_batch: int | None = None  # clips per forward on one worker; None = the worker's whole share
    ema_decay: float | None = None  # release and validate the averaged weights
    validate_every: int = 2000
    checkpoint_every: int = 2000
    max_seconds: float | None = None  # stop earlier than `steps`, with the schedule brought to its end in time

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "linear", "cosine"):
            raise UserError(f"decay is {self.decay!r}; expected constant, linear or cosine")
        if self.steps < 1 or self.global_batch < 1:
            raise UserError(f"steps and global_batch must be positive, got {self.steps} and {self.global_batch}")

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate of the update after `step` finished ones; `progress` in [0, 1] is the share of the run done."""
        rate = self.learning_rate
        if step < self.warmup_steps:
            return rate * (step + 1) / self.warmup_steps
        if self.decay == "linear":
            return rate * (1.0 - progress)
        if self.decay == "cosine":
            return rate * 0.5 * (1.0 + float(np.cos(np.pi * progress)))
        return rate


class ClipSource(Protocol):
    """Training clips as `Stage.prepare` sees them: the wanted rows of the clip table, and one clip with its arrays."""

    rows: list[dict[str, Any]]

    def clip(self, index: int) -> dict[str, Any]:
        """Row `index` together with its arrays, by member name."""
        ...


class Stage(nn.Module):
    """One trainable unit of the system.

    A stage says what it reads, which parts are optimised and by which losses; the loop in
    `pipelines/train_loop.py` owns backward, clipping, stepping, EMA, precision, logging and saving.

    Randomness has two sources only: `example` gets a generator seeded by (seed, epoch, clip), and a batch
    carries `step_rng`, seeded by (seed, step) and equal on all workers. So a run does not depend on the
    number of workers, and a resumed run repeats the uninterrupted one.
    """

    name: ClassVar[str]
    any_corpus: ClassVar[bool] = True  # learns from whatever the store holds, not from the variant's corpora alone
    series: ClassVar[tuple[str, ...]] = ()  # feature-store series it reads
    otherwise: ClassVar[str] = ""  # what to do where a store has nothing to train it on
    blocks: tuple[type[nn.Module], ...] = ()  # repeated blocks, sharded one by one before their part
    entries: tuple[type[nn.Module], ...] = ()  # modules inside a part that are also called alone: sharded on their own

    @classmethod
    def reads(cls, variant: Variant) -> tuple[str, ...]:
        """The feature-store series it reads for this variant."""
        return cls.series

    @classmethod
    def builds_on(cls, variant: Variant) -> tuple[str, ...]:
        """The earlier stages whose released weights `prepare` and `build` read for this variant."""
        return ()

    @classmethod
    def prepare(cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path) -> None:
        """Make, once and before the workers start, what `build` needs from the data (tokenizers, scales).

        The result lies in `folder` and reaches `build` as `released("prepared")`.
        """

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> Stage:
        """A fresh stage; `released(name)` is the folder of an earlier stage's weights (or raises UserError)."""
        raise TypeError(f"{cls.__name__} does not say how it is built")

    def parts(self) -> dict[str, nn.Module]:
        """Separately optimised modules by the names under which `losses` yields."""
        raise TypeError(f"{type(self).__name__} does not name its parts")

    @classmethod
    def wants(cls, row: Mapping[str, Any]) -> bool:
        """Whether a clip of the table (a row without arrays) is of use to this stage."""
        return True

    @classmethod
    def asks(cls, variant: Variant) -> str:
        """What it needs of a store, in words: "clips with captions or labels"."""
        return "clips"

    @classmethod
    def learns_from(cls, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these training clips are enough for it."""
        return any(cls.wants(row) for row in rows)

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """One training example from a clip's row and arrays; every random choice is drawn from `rng`."""
        raise TypeError(f"{type(self).__name__} does not make examples")

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield (part, loss, logs) for every part that moves in this step; resumed after that part has been stepped.

        `batch` holds stacked examples, `step` (finished updates) and `step_rng`.
        """
        raise TypeError(f"{type(self).__name__} has no losses")

    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalar measures of one validation batch, averaged by the loop."""
        return {}

    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Something to see or hear from one validation batch: "audio/…" [T] waveforms, "mel/…" [F, M] images."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the weights that later stages and the bundle use, as safetensors and JSON."""
        raise TypeError(f"{type(self).__name__} does not say how it is released")


# ---------------------------------------------------------------------------------------------- released folders


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` that takes its place only when everything in it has been written."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if final.exists():
            old = draft.with_name(draft.name + ".old")
            os.replace(final, old)
            os.replace(draft, final)
            shutil.rmtree(old)
        else:
            os.replace(draft, final)
    finally:
        if draft.exists():
            shutil.rmtree(draft)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def release(stage: Stage, folder: Path, card: Mapping[str, Any]) -> None:
    """Save a trained stage as `folder` with its card (`stage.json`: what it is and what made it)."""
    with whole_folder(folder) as draft:
        stage.save(draft)
        write_json(draft / "stage.json", {"format": STAGE_FORMAT, "stage": stage.name, **card})


def read_card(folder: Path, stage: str) -> dict[str, Any]:
    """The card of a released stage.

    Raises UserError when the folder is not a release of `stage` in this format.
    """
    path = Path(folder) / "stage.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no released stage (no stage.json); run `loa train {stage}` or name another folder")
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if card.get("format") != STAGE_FORMAT:
        raise UserError(f"{path} has format {card.get('format')}, this version of loa reads {STAGE_FORMAT}")
    if card.get("stage") != stage:
        raise UserError(f"{folder} holds the stage {card.get('stage')!r}, expected {stage!r}")
    return card


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of all safetensors files below `folder`."""
    digest = hashlib.sha256()
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights")
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """What made the data: the git revision of a checkout ("+" when it has local changes), else the package version."""
    folder = Path(__file__).resolve().parent.parent
    if (folder / ".git").exists():
        try:
            told = [
                subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
            ]
            return told[0] + ("+" if told[1] else "")
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a checkout without commits
    try:
        return f"loa {metadata.version('loa')}"
    except metadata.PackageNotFoundError:
        return "unknown"


# ------------------------------------------------------------------------------------------------ configurations


def to_dict(config: Any) -> Any:
    """A configuration value as JSON: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(v) for v in config]
    return config


def from_dict(like: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass value `like` with the fields of `values` (a `to_dict` result) put in."""
    changes = {}
    for key, value in values.items():
        old = _field(like, key)
        changes[key] = from_dict(old, value) if dataclasses.is_dataclass(old) and isinstance(value, Mapping) else _retype(old, value, key)
    return dataclasses.replace(like, **changes)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if isinstance(values, Mapping):
        return {k: v for key, inner in values.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): values}


def differences(was: Any, now: Any, most: int = 5) -> str:
    """What differs between two configurations (dataclasses or `to_dict` results): "name: was A, now B; …"; "" if nothing."""
    old, new = (flat(json.loads(json.dumps(to_dict(config)))) for config in (was, now))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = [f"{name}: was {_said(old.get(name))}, now {_said(new.get(name))}" for name in changed[:most]]
    return "; ".join(told + ([f"and {len(changed) - most} more"] if len(changed) > most else []))


def _said(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def override(config: Any, settings: Mapping[str, str]) -> Any:
    """Apply dotted settings such as {"diffusion.recipe.learning_rate": "5e-5"} to a nested dataclass value.

    Raises UserError for a name that does not exist, with the nearest that do.
    """
    for path, text in settings.items():
        config = _set(config, path.split("."), text, path)
    return config


def _set(config: Any, keys: list[str], text: str, path: str) -> Any:
    old = _field(config, keys[0], path)
    if len(keys) > 1:
        if not dataclasses.is_dataclass(old):
            raise UserError(f"--set {path}: {keys[0]!r} is a plain value and has no field {keys[1]!r}")
        new = _set(old, keys[1:], text, path)
    elif dataclasses.is_dataclass(old):
        raise UserError(f"--set {path}: this is a group; name one of its fields: {', '.join(f.name for f in dataclasses.fields(old))}")
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        new = _retype(old, value, path)
    return dataclasses.replace(config, **{keys[0]: new})


def _field(config: Any, name: str, path: str | None = None) -> Any:
    names = [f.name for f in dataclasses.fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.4) or names
        raise UserError(f"unknown setting {path or name!r}: {type(config).__name__} has no field {name!r}; nearest: {', '.join(near)}")
    return getattr(config, name)


def _retype(old: Any, value: Any, path: str) -> Any:
    """`value` (from JSON) in the type of the value it replaces; None in either place admits anything."""
    if isinstance(value, list):
        value = tuple(_retype(None, v, path) for v in value)
    if old is None or value is None:
        return value
    if isinstance(old, bool) or isinstance(value, bool):
        fits = isinstance(old, bool) and isinstance(value, bool)
    elif isinstance(old, float):
        fits = isinstance(value, (int, float))
        value = float(value) if fits else value
    else:
        fits = isinstance(value, type(old))
    if not fits:
        raise UserError(f"setting {path!r} takes a value like {old!r} ({type(old).__name__}), got {value!r}")
    return value
