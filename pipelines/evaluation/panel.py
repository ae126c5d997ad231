"""The panel of an evaluation: the judges and readers that its options name, and those that training has left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pipelines.evaluation.clips import Channels
from pipelines.evaluation.listening import ClapJudge, ClassifierJudge, Judge, as_trained, published_judges
from pipelines.evaluation.options import PanelOptions
from pipelines.evaluation.words import AsrReader, Hypotheses, Reader
from stages.audio import AudioConfig
from stages.bundle import local_bundle, read_info
from stages.errors import UserError
from stages.files import Place
from stages.judges.catalogue import AUDIOLDM_EVAL, Listening
from stages.judges.whisper import Transcriber


@dataclass(frozen=True)
class Panel:
    """Judges and readers, and how multi-channel recordings reach them."""

    judges: list[Judge] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    channels: Channels = "mean"


def own_panel(options: PanelOptions, bundle: Path, classifier: Path | Place, audio: AudioConfig, device: str | None = None) -> Panel:
    """The CLAP of the bundle (or of the options) and the classifier if there is one, and what the options add."""
    device = device or _device()
    judges = _trained_judges(bundle, classifier, audio, device, options.clap)
    judges += _published(options, min(10.0, audio.clip_seconds), device)
    return Panel(judges, _readers(options, device), _channels(options))


def named_panel(options: PanelOptions, work: str | Path | Place, hypotheses: dict[str, Path]) -> Panel:
    """The judges and readers that the options name; without any, the judges that training has left in `work`.

    Args:
        hypotheses: tables of what other recognisers have read, by their names.

    Raises:
        UserError: there is nothing to judge with.
    """
    work = Place.of(work)
    device, bundle = _device(), work / "bundle"
    judges = _published(options, 10.0, device)
    if options.clap is not None:
        judges.append(ClapJudge(options.clap, device=device))
    readers: list[Reader] = [*_readers(options, device), *(Hypotheses(name, path) for name, path in hypotheses.items())]
    if not judges and not readers:
        if not (bundle / "text_encoder").exists():
            raise UserError(
                f"nothing to judge with: name --judges, --clap, --asr or --hypotheses, or a --work whose bundle has a CLAP ({bundle})"
            )
        judges = _trained_judges(local_bundle(bundle), work / "stages" / "classifier", read_info(bundle).audio, device)
    return Panel(judges, readers, _channels(options))


def _trained_judges(bundle: Path, classifier: Path | Place, audio: AudioConfig, device: str, clap: Path | None = None) -> list[Judge]:
    judges: list[Judge] = [ClapJudge(clap or bundle, None if clap else as_trained(audio), device)]
    classifier = Place.of(classifier)
    return judges + ([ClassifierJudge(classifier.local_copy(), audio, device)] if (classifier / "config.json").exists() else [])


def _published(options: PanelOptions, seconds: float, device: str) -> list[Judge]:
    """`seconds`: what the judges take of a clip unless the options say it."""
    if options.folder is None:
        if options.names:
            raise UserError(f"the weights of {options.names[0]} are not available; name the folder that holds them with --judges")
        return []
    listening = AUDIOLDM_EVAL if options.listening == "audioldm_eval" else Listening()
    if listening.clip_seconds is not None:
        listening = replace(listening, clip_seconds=options.seconds or seconds)
    return published_judges(options.folder, options.names, listening, options.batch, device)


def _readers(options: PanelOptions, device: str) -> list[Reader]:
    return [AsrReader(Transcriber(options.asr, device))] if options.asr is not None else []


def _channels(options: PanelOptions) -> Channels:
    """audioldm_eval takes the first channel."""
    return "first" if options.listening == "audioldm_eval" else "mean"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
