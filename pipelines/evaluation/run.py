"""Evaluations from beginning to end: make the sets of clips, score them, keep what came out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from options import again
from pipelines import plots
from pipelines.evaluation.clips import Chosen, ClipSet, Selection, choose_clips
from pipelines.evaluation.options import PanelOptions
from pipelines.evaluation.panel import Panel, own_panel
from pipelines.evaluation.results import SYSTEMS, WITH_SOUND, Evaluation
from pipelines.evaluation.scores import Scores, score_sets
from pipelines.evaluation.sounds import Making, Sounds, mels
from pipelines.features.reader import StoreReader
from pipelines.features.store import FeatureStore
from pipelines.tracking import Tracker
from stages.audio import load_audio, mel_centres
from stages.bundle import BundleInfo, local_bundle, read_info
from stages.errors import UserError
from stages.files import Place, weights_hash
from stages.generator import AudioGenerator
from stages.sampling import resolve

IN_MLFLOW = 8  # clips whose sound and spectrograms are logged


def evaluate(
    work: str | Path | Place,
    selection: Selection | None = None,
    sampling: Mapping[str, Any] | None = None,
    panel: PanelOptions | None = None,
    *,
    bundle: str | Path | Place | None = None,
    store: str | None = None,
    name: str | None = None,
    device: str | None = None,
    tracker: Tracker | None = None,
) -> Evaluation:
    """Generate one clip for each held-out caption, score all sets, and write `<work>/evaluation`.

    Behind a URL that folder is written on this machine, where an interrupted call continues, and put there when it is whole.

    Args:
        selection: which captions; 100 of the test split by default.
        sampling: options of `stages.sampling.resolve`, "profile" among them. Every clip is as long as the real ones.
        panel: judges besides the bundle's CLAP and the classifier of `work`.
        bundle: `<work>/bundle` by default.
        store: feature store with the held-out clips; `<work>/store` by default.
        name: what the system is called beside others; the variant's name by default.

    Raises:
        UserError: there is no bundle, no store, no held-out clip with a caption, or the store lacks clips of a frozen list.
    """
    work, tracker = Place.of(work), tracker or Tracker.off()
    named, store_at = Place.of(bundle or work / "bundle"), Place.of(store or work / "store")
    with (work / "evaluation").writing_folder(["evaluation.json"], continued=True) as folder:
        return _evaluate(
            work, folder, named, store_at, selection or Selection(), sampling or {}, panel or PanelOptions(), name, device, tracker
        )


def _evaluate(
    work: Place,
    folder: Path,
    named: Place,
    store: Place,
    selection: Selection,
    sampling: Mapping[str, Any],
    panel: PanelOptions,
    name: str | None,
    device: str | None,
    tracker: Tracker,
) -> Evaluation:
    """`evaluate` with all of its defaults filled in; sounds and scores go to the local `folder`."""
    info, opened = _matching(named, store)
    bundle = local_bundle(named)
    reader = opened.reader(["waveform"])
    chosen = choose_clips(reader, selection, info.speech)
    sounds = Sounds(folder, opened.audio, _making(bundle, opened.audio.clip_seconds, selection.seed, sampling))
    _make_sounds(sounds, chosen, reader, bundle, info.speech, panel.batch, device, tracker)

    judged = own_panel(panel, bundle, work / "stages" / "classifier", opened.audio, device)
    sets = sounds.sets(chosen, name or info.variant)
    scores = score_sets(sets, judged.judges, judged.readers, audio=opened.audio, channels=judged.channels, cache=folder / "cache")
    _explain(scores, judged, selection, panel)
    protocol = {
        **sounds.making.settings(),
        "profile": sampling.get("profile", "loa"),
        "variant": info.variant,
        "bundle": str(named),
        "store": opened.root,
        "split": chosen.split,
        "num_clips": len(chosen.clips),
        "captions_sha256": scores.system.captions_sha256,
        "sample_rate": opened.audio.sample_rate,
        "judges": {judge.name: judge.weights_hash for judge in judged.judges},
        "code_version": scores.records[0].code_version,
        "mlflow_run_id": tracker.handle().run_id,
    }
    evaluation = Evaluation.of(scores, chosen.clips, protocol, folder)
    evaluation.save(scores, chosen.clips, folder)
    _log(evaluation, folder, opened, tracker)
    return evaluation


def _matching(bundle: Place, store: Place) -> tuple[BundleInfo, FeatureStore]:
    """The bundle and the store, when they belong together."""
    info, opened = read_info(bundle), FeatureStore.open(store)
    differing = [
        f"{name} {getattr(opened.audio, name)} against {getattr(info.audio, name)}"
        for name in ("sample_rate", "mel_bins", "hop_length")
        if getattr(opened.audio, name) != getattr(info.audio, name)
    ]
    if differing:
        raise UserError(
            f"the clips of the store {opened.root} and those that the bundle {bundle} makes differ: {', '.join(differing)}; "
            "name the store it was trained on with --store"
        )
    return info, opened


def _making(bundle: Path, seconds: float, seed: int, sampling: Mapping[str, Any]) -> Making:
    """How the sounds are made, with every sampling option resolved: defaults may change, records must not."""
    options = asdict(resolve(**{**sampling, "length": "loa"}))
    ranker = f"clap {weights_hash(bundle / 'text_encoder')}" if options["candidates"] > 1 else None
    return Making(weights_hash(bundle), seed, seconds, options, ranker)


def _make_sounds(
    sounds: Sounds, chosen: Chosen, reader: StoreReader, bundle: Path, speech: bool, batch: int, device: str | None, tracker: Tracker
) -> None:
    """Make what is missing; a second evaluation loads no generator."""
    generator = cache(lambda: AudioGenerator.load(bundle, device))
    began = time.monotonic()
    if made := sounds.generate(chosen.clips, generator, speech, batch):
        tracker.metrics({"speed/seconds_per_clip": (time.monotonic() - began) / made})
    sounds.keep_real([*chosen.clips, *chosen.others], reader)
    sounds.restore(chosen.clips, generator, batch)


def _explain(scores: Scores, judged: Panel, selection: Selection, options: PanelOptions) -> None:
    """Say what is absent, and what raises a score."""
    if not any(judge.name == "classifier" for judge in judged.judges):
        labelled = any(clip.label for clip in scores.system.clips)
        hint = (
            f"no classifier is trained (`{again('loa train classifier')}`)"
            if labelled
            else "the clips have no labels to train a classifier on"
        )
        scores.missing |= dict.fromkeys(("accuracy", "kl", "frechet_classifier"), hint)
    if selection.captions is None and len(scores.system.clips) < selection.count:
        scores.notes.append(f"{selection.count} clips were asked for; the split has {len(scores.system.clips)}")
    if options.clap is None:
        scores.notes.append("CLAP scores use the CLAP that also conditions the generator, which raises them; see --clap")


def _log(evaluation: Evaluation, folder: Path, store: FeatureStore, tracker: Tracker) -> None:
    """Scores, tables, sounds and spectrograms to MLflow."""
    if not tracker.handle().run_id:
        return
    audio = store.audio
    tracker.params(evaluation.protocol)
    tracker.tags({f"loa.{name}": evaluation.protocol[name] for name in ("bundle_sha256", "captions_sha256", "store")})
    tracker.metrics({f"{measure}/{column}": value for measure, values in evaluation.scores.items() for column, value in values.items()})
    for name in ("evaluation.json", "table.txt", "confusion.png", "classes.png"):
        if (folder / name).is_file():
            tracker.artifact(folder / name)
    columns = [name for name in evaluation.clips[0] if name != "files"]
    tracker.table("clips", columns, [[row.get(name) for name in columns] for row in evaluation.clips])
    for row in evaluation.clips[:IN_MLFLOW]:
        pictures = {}
        for column in reversed(WITH_SOUND):
            waveform = load_audio(folder / row["files"][column], audio.sample_rate)
            tracker.audio(f"{row['clip_id']}/{column}", waveform, audio.sample_rate)
            pictures[SYSTEMS[column]] = mels([waveform], audio)[0]
        tracker.spectrogram(f"generated/{row['clip_id']}", pictures["generated"])
        picture = plots.spectrograms(pictures, audio.clip_seconds, mel_centres(audio).tolist())
        tracker.file(f"samples/step_000000/{row['clip_id']}/spectrograms.png", picture.png(dpi=96))


def score_folders(
    generated: ClipSet, reference: ClipSet, panel: Panel, output: str | Path | Place, cache: Path | None = None
) -> Evaluation:
    """Score the set `generated` beside `reference`, and write records and table to `output`.

    Args:
        generated, reference: as `folder_set` makes them.
        cache: where embeddings are kept.

    Raises:
        UserError: a set holds clips that cannot be scored.
    """
    scores = score_sets({"generated": generated, "real": reference}, panel.judges, panel.readers, channels=panel.channels, cache=cache)
    protocol = {
        "system": generated.name,
        "num_clips": len(generated.clips),
        "captions_sha256": generated.captions_sha256,
        "references_sha256": reference.sha256,
        "judges": {judge.name: judge.weights_hash for judge in panel.judges},
        **generated.made,
    }
    with Place.of(output).writing_folder(["evaluation.json"]) as folder:
        evaluation = Evaluation.of(scores, generated.clips, protocol, folder)
        evaluation.save(scores, generated.clips, folder)
    return evaluation
