"""JOB: generate for held-out captions, and score what is heard beside what could be reached at best.

Four systems are heard for the same clips: `generated` (from the caption alone), `vae` (the real clip through VAE and
vocoder), `vocoder` (the real clip's spectrogram through the vocoder), and `real`. Every score is taken from final
waveforms, which lie in `<work>/evaluation` with the record of how they were made. A killed evaluation continues.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from click.core import ParameterSource

from options import friendly, sampling_options, tracking_option, work_option
from pipelines import plots
from pipelines.evaluation import listening as judging
from pipelines.evaluation.clips import HeldOut, captions_hash, choose_clips, frozen_clips, write_captions
from pipelines.evaluation.listening import Channels, ClapJudge, ClassifierJudge, ClipFile, Judge
from pipelines.evaluation.records import Record, digest, write_records
from pipelines.evaluation.results import HEARD, SYSTEMS, Evaluation, classes_picture, confusion_picture
from pipelines.evaluation.scores import Scored, records, score, words
from pipelines.evaluation.sounds import Sounds, mels
from pipelines.features.store import FeatureStore
from pipelines.score import score_folders
from pipelines.tracking import Tracker
from stages.audio import AudioConfig, Waveform, slaney_filterbank
from stages.bundle import BundleInfo, read_info
from stages.errors import UserError
from stages.files import code_version, weights_hash, write_json
from stages.generator import AudioGenerator
from stages.judges.judge import AUDIOLDM_EVAL, JUDGES, Listening
from stages.judges.whisper import Transcriber
from stages.sampling import OPTIONS, resolve

if TYPE_CHECKING:
    from stages.variants import Variant

LISTENING = {"loa": Listening(), "audioldm_eval": AUDIOLDM_EVAL}
HEARD_IN_MLFLOW = 8  # clips whose sound and spectrograms are logged


# ------------------------------------------------------------------------------------------------------- the job


def evaluate(
    work: Path,
    variant: Variant | None = None,
    *,
    bundle: Path | None = None,
    store: str | None = None,
    clap: Path | None = None,
    classifier: Path | None = None,
    num_clips: int = 100,
    split: str | None = None,
    profile: str = "loa",
    seed: int = 0,
    batch: int = 8,
    device: str | None = None,
    tracker: Tracker | None = None,
    name: str | None = None,
    captions: Path | None = None,
    judges: Sequence[Judge] = (),
    transcriber: Transcriber | None = None,
    channels: Channels = "mean",
    **options: Any,
) -> Evaluation:
    """Generate one clip for each held-out caption, score all systems, and write `<work>/evaluation`.

    Args:
        variant: the system the bundle is expected to hold; anything goes if None.
        bundle: `<work>/bundle` by default.
        store: feature store with the held-out clips; `<work>/store` by default.
        clap: folder of the CLAP that scores; by default the bundle's own, which favours its captions.
        classifier: folder of the classifier; `<work>/stages/classifier` by default.
        num_clips: how many captions, taken in turn from all classes.
        split: "test" if it has clips with captions, else "validation", by default.
        profile: whose way of sampling, with `options` in place of its own (`stages.sampling.resolve`). Every clip is as long
            as the real ones, whatever the profile's `length`.
        batch: clips at a time.
        name: what the system is called beside others; the variant's name by default.
        captions: a frozen caption list; its clips are taken, with its captions, instead of `num_clips` of `split`.
        judges: published networks that listen besides CLAP and the classifier.
        transcriber: reads the clips of a speech system, for error rates.
        channels: what the records say of channels; the sounds here have one, for which both rules are the same.

    Raises:
        UserError: there is no bundle, no store, no held-out clip with a caption, or the store lacks clips of `captions`.
    """
    work, tracker = Path(work).absolute(), tracker or Tracker.off()
    bundle = Path(bundle or work / "bundle")
    info, opened = _matching(bundle, store or str(work / "store"), variant)
    audio, reader = opened.audio, opened.reader(["waveform"])
    if captions is None:
        split, clips, others = choose_clips(opened.clips(), reader, split, num_clips, seed, info.speech)
    else:
        split, clips, others = frozen_clips(opened.clips(), reader, captions, seed, info.speech)
    settings = {
        "bundle_sha256": weights_hash(bundle), "seed": seed, "seconds": audio.clip_seconds,
        **asdict(resolve(profile, **options | {"length": "loa"})),
    }  # fmt: skip
    place = work / "evaluation"
    sounds = Sounds(place, audio, generated=digest(settings, 12), restored=digest(settings["bundle_sha256"], 12))
    generator = cache(lambda: AudioGenerator.load(bundle, device))  # a second evaluation needs none
    began = time.monotonic()
    if made := sounds.generate(clips, generator, settings, info.speech, batch):
        tracker.metrics({"speed/seconds_per_clip": (time.monotonic() - began) / made})
    sounds.keep_real(clips, reader)
    sounds.restore(clips, generator, batch)
    generator.cache_clear()

    classifier = Path(classifier or work / "stages" / "classifier")
    own_clap, own_classifier = _own_judges(bundle, clap, classifier, audio, device)
    heard = {system: [sounds.read(system, clip) for clip in clips] for system in HEARD}
    elsewhere = [reader.read(clip.clip_id)["waveform"] for clip in others]
    scored = score(clips, heard, elsewhere, own_clap, own_classifier, audio, info.speech)
    if own_classifier is None:
        reason = f"there is no classifier at {classifier}; train one with `loa train classifier`"
        scored.missing |= dict.fromkeys(("accuracy", "kl", "frechet_classifier"), reason)
    on_disk = {system: [ClipFile.of(sounds.path(system, clip)) for clip in clips] for system in HEARD}
    by_name = sorted(range(len(clips)), key=lambda i: clips[i].clip_id)  # the inception score depends on the order
    for judge in judges:
        scored.add_judged(judge, {s: judging.hear_files(judge, [on_disk[s][i] for i in by_name], cache=place / "cache") for s in HEARD})
    if transcriber is not None:
        words(scored, clips, heard, transcriber, audio)

    if captions is None and len(clips) < num_clips:
        scored.notes.append(f"{num_clips} clips were asked for; the split {split} has {len(clips)}")
    if clap is None:
        scored.notes.append("CLAP scores use the CLAP that also conditions the generator, which raises them; see --clap")
    protocol = {
        **settings, "variant": info.variant, "bundle": str(bundle), "store": opened.root, "split": split, "num_clips": len(clips),
        "captions_sha256": captions_hash(clips), "candidates_per_caption": settings["candidates"], "sample_rate": audio.sample_rate,
        "front_end": "mean removed, peak 0.5, cut or padded to the clip length, log-mel of 16-bit waveforms",
        "kl_direction": "KL(real || heard)", "frechet": "float64, ddof 1, not square-rooted", "clap": str(clap or bundle),
        "clap_sha256": own_clap.weights_hash, "classifier_sha256": own_classifier.weights_hash if own_classifier else None,
        "judges": {judge.name: judge.weights_hash for judge in judges},
        "code_version": code_version(), "mlflow_run_id": tracker.handle().run_id,
    }  # fmt: skip
    files = [{s: sounds.path(s, clip).relative_to(place).as_posix() for s in HEARD} for clip in clips]
    found = Evaluation(
        protocol=protocol,
        scores={name: {s: values[s] for s in SYSTEMS if s in values} for name, values in scored.scores.items() if values},
        intervals=scored.intervals,
        missing=scored.missing,
        notes=scored.notes,
        classes=scored.classes,
        confusion=scored.confusion,
        clips=[row | {"files": paths} for row, paths in zip(scored.clips, files, strict=True)],
    )
    write_captions(place / "captions.json", clips)
    write_records(place / "records", _records(scored, clips, on_disk, settings, bundle, name or info.variant, channels))
    _write(found, place)
    _log(found, heard, place, audio, tracker)
    return found


def _matching(bundle: Path, store: str, variant: Variant | None) -> tuple[BundleInfo, FeatureStore]:
    """The bundle and the store, when they belong together."""
    info = read_info(bundle)
    if variant is not None and variant.name != info.variant:
        raise UserError(f"{bundle} holds {info.variant}, expected {variant.name}; export that one or name its bundle with --bundle")
    opened = FeatureStore.open(store)
    audio = opened.audio
    if (audio.sample_rate, audio.mel_bins, audio.hop_length) != (info.audio.sample_rate, info.audio.mel_bins, info.audio.hop_length):
        raise UserError(
            f"the store {opened.root} holds clips of {audio}, the bundle {bundle} makes {info.audio}; name the store it was trained for"
        )
    return info, opened


def _own_judges(
    bundle: Path, clap: Path | None, classifier: Path, audio: AudioConfig, device: str | None
) -> tuple[ClapJudge, ClassifierJudge | None]:
    """What training left to judge with: CLAP, and the classifier where there is one."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own_clap = ClapJudge(clap or bundle, None if clap else judging.as_trained(audio), place)
    there = (classifier / "config.json").is_file()
    return own_clap, ClassifierJudge(classifier, audio, place) if there else None


def _records(
    scored: Scored,
    clips: Sequence[HeldOut],
    on_disk: Mapping[str, Sequence[ClipFile]],
    settings: Mapping[str, Any],
    bundle: Path,
    name: str,
    channels: Channels,
) -> list[Record]:
    """The records of all scores, with how each system's sounds came about.

    Those that only the real clips and the weights decide have no sampling settings.
    """
    names = [clip.clip_id for clip in clips]
    sets = {system: judging.set_hash(dict(zip(names, files, strict=True))) for system, files in on_disk.items()}
    restored = {"weights_sha256": settings["bundle_sha256"]}
    sampled = {**restored, **{k: v for k, v in settings.items() if k not in ("bundle_sha256", "candidates")}}
    told = {"generated": sampled, "vae": restored, "vocoder": restored}
    origins = {system: {**about, "sounds_sha256": sets[system]} for system, about in told.items()}
    ranker = f"clap {weights_hash(bundle / 'text_encoder')}" if settings["candidates"] > 1 else None
    common = {
        "num_generated": len(clips), "captions_sha256": captions_hash(clips), "references_sha256": sets["real"], "channels": channels,
        "candidates": settings["candidates"], "ranker": ranker,
    }  # fmt: skip
    return records(scored, name, common, origins)


# ------------------------------------------------------------------------------------------------ what is left of it


def _write(found: Evaluation, place: Path) -> None:
    """evaluation.json last: when it is there, so is everything it speaks of."""
    for name, picture in (("confusion", confusion_picture(found)), ("classes", classes_picture(found))):
        if picture is not None:
            (place / f"{name}.png").write_bytes(picture.png())
        else:
            (place / f"{name}.png").unlink(missing_ok=True)
    (place / "table.txt").write_text(found.table(), encoding="utf-8")
    write_json(place / "evaluation.json", asdict(found))


def _log(found: Evaluation, heard: Mapping[str, Sequence[Waveform]], place: Path, audio: AudioConfig, tracker: Tracker) -> None:
    if not tracker.handle().run_id:
        return
    tracker.params(found.protocol)
    tracker.tags({f"loa.{name}": found.protocol[name] for name in ("bundle_sha256", "captions_sha256", "store")})
    tracker.metrics({f"{measure}/{system}": value for measure, values in found.scores.items() for system, value in values.items()})
    for name in ("evaluation.json", "table.txt", "confusion.png", "classes.png"):
        if (place / name).is_file():
            tracker.artifact(place / name)
    columns = [name for name in found.clips[0] if name != "files"]
    tracker.table("clips", columns, [[row.get(name) for name in columns] for row in found.clips])
    filters = slaney_filterbank(audio.sample_rate, audio.n_fft, audio.mel_bins, audio.fmin, audio.fmax)
    centres = filters @ np.linspace(0.0, audio.sample_rate / 2, filters.shape[1]) / filters.sum(1)
    for i, row in enumerate(found.clips[:HEARD_IN_MLFLOW]):
        seen = {}
        for system in reversed(HEARD):
            tracker.audio(f"{row['clip_id']}/{system}", heard[system][i], audio.sample_rate)
            seen[SYSTEMS[system]] = mels([heard[system][i]], audio)[0]
        tracker.spectrogram(f"generated/{row['clip_id']}", seen["generated"])
        picture = plots.spectrograms(seen, audio.clip_seconds, centres.tolist())
        tracker.file(f"samples/step_000000/{row['clip_id']}/spectrograms.png", picture.png(dpi=96))


@click.command()
@work_option
@click.option("--bundle", type=click.Path(file_okay=False, path_type=Path), help="What to evaluate.  [default: bundle in --work]")
@click.option("--store", metavar="DIR", help="Feature store with the held-out clips.  [default: store in --work]")
@click.option(
    "--generated",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Score this folder of clips, whatever made them, instead of generating.",
)
@click.option(
    "--reference", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The real clips beside --generated, of equal names."
)
@click.option(
    "--judges",
    "judges_folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of public judges' weights (`loa judges`): VGGish, CNN14, PaSST.",
)
@click.option(
    "--judge", "judge_names", multiple=True, type=click.Choice(list(JUDGES)), help="One of --judges; may be repeated.  [default: all there]"
)
@click.option(
    "--listening",
    type=click.Choice(list(LISTENING)),
    default="loa",
    show_default=True,
    help="How recordings reach --judges: loa's contract, or audioldm_eval's.",
)
@click.option("--seconds", type=click.FloatRange(min=0.32), help="What judges hear of a clip.  [default: 10, or the store's if shorter]")
@click.option(
    "--clap",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A CLAP to score with that did not help to train the bundle.",
)
@click.option(
    "--captions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Frozen caption list: JSON, or CSV with clip_id and caption.",
)
@click.option("--name", help="What the system is called in records and reports.  [default: the variant, or the folder's name]")
@click.option("--num-clips", type=click.IntRange(min=2), default=100, show_default=True, help="Captions, taken in turn from all classes.")
@click.option("--split", metavar="NAME", help="Split of the held-out clips.  [default: test, else validation]")
@sampling_options("length")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--ranker", help="What chose among the candidates of --generated.")
@click.option(
    "--hypotheses",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV with clip_id, text: words read in --generated, for WER and CER.",
)
@click.option("--reader", help="What read --hypotheses, such as whisper-large-v3.")
@click.option(
    "--asr",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a Whisper that reads the clips, for WER and CER.",
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Clips at a time.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where records of --generated go.  [default: scores/NAME in --work]",
)
@tracking_option
@click.pass_context
@friendly
def main(
    context: click.Context, work: Path, generated: Path | None, sampling: dict[str, Any], tracking_uri: str | None, **options: Any
) -> None:
    """Score a system: generate for held-out captions of a store, or take a folder of clips.

    The same command continues an interrupted evaluation; more clips add to those there are. With --generated and
    --reference no bundle and no store is needed; then --seed, --profile, --steps and the other options of sampling only tell how
    the clips were made, and what is not told is recorded as unknown. `loa report` puts systems side by side.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if generated is not None:
        _score_folders(work, generated, _told(sampling, given, options["seed"]), options, given)
        return
    unused = given & {"reference", "ranker", "hypotheses", "reader", "output"}
    if unused:
        raise UserError(f"--{sorted(unused)[0]} goes with --generated, the folder of clips to score; without it loa generates them")
    bundle, seed = options["bundle"], options["seed"]
    info = read_info(bundle or work / "bundle")
    judges = _judges(options, min(10.0, info.audio.clip_seconds))
    transcriber = Transcriber(options["asr"], "cuda" if torch.cuda.is_available() else "cpu") if options["asr"] else None
    # Each bundle and setting has a run of its own, so that MLflow can compare them.
    settings = [weights_hash(bundle or work / "bundle"), options["num_clips"], options["split"], asdict(resolve(**sampling)), seed]
    settings += [str(options["captions"])] if options["captions"] else []
    with Tracker.open(tracking_uri, work=work, job=f"evaluate-{digest(settings, 8)}", name="evaluate", variant=info.variant) as tracker:
        found = evaluate(
            work, bundle=bundle, store=options["store"], clap=options["clap"], num_clips=options["num_clips"], split=options["split"],
            seed=seed, batch=options["batch"], tracker=tracker, name=options["name"], captions=options["captions"], judges=judges,
            transcriber=transcriber, channels=_channels(options), **sampling,
        )  # fmt: skip
    click.echo(found.table())
    click.echo(f"sounds and scores: {os.path.relpath(work / 'evaluation')}")


def _judges(options: Mapping[str, Any], seconds: float) -> list[Judge]:
    """The published judges that the command names."""
    if options["judges_folder"] is None:
        if options["judge_names"]:
            raise UserError(f"--judge {options['judge_names'][0]} names one of the weights in a folder; name the folder with --judges")
        return []
    listening = LISTENING[options["listening"]]
    if listening.clip_seconds is not None:
        listening = replace(listening, clip_seconds=options["seconds"] or seconds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return judging.published_judges(options["judges_folder"], options["judge_names"], listening, options["batch"], device)


def _told(sampling: Mapping[str, Any], given: set[str], seed: int) -> dict[str, Any]:
    """What the command line says of how clips were made: a whole profile, or single points and None for the others."""
    whole = asdict(resolve(**sampling)) if "profile" in given else {}
    return {name: sampling.get(name) for name in OPTIONS} | whole | {"seed": seed if "seed" in given else None}


def _channels(options: Mapping[str, Any]) -> Channels:
    return "first" if options["listening"] == "audioldm_eval" else "mean"


def _score_folders(work: Path, generated: Path, made: Mapping[str, Any], options: Mapping[str, Any], given: set[str]) -> None:
    """`loa evaluate --generated`: the judges at hand, the scores, the records."""
    if options["reference"] is None:
        raise UserError(f"{generated} is scored beside real clips; name their folder with --reference")
    unused = given & {"store", "split", "num_clips"}
    if unused:
        raise UserError(f"--{sorted(unused)[0].replace('_', '-')} chooses clips of a store; with --generated the folders are the clips")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = options["seconds"] or 10.0
    judges = _judges(options, seconds)
    bundle = options["bundle"] or work / "bundle"
    if options["clap"] is not None:
        judges.append(ClapJudge(options["clap"], device=device))
    elif not judges and (bundle / "text_encoder").is_dir():
        # What training left here hears as it was trained, in the clip length of its system.
        audio = read_info(bundle).audio
        seconds = options["seconds"] or audio.clip_seconds
        judges.append(ClapJudge(bundle, judging.as_trained(audio), device))
        if (work / "stages" / "classifier" / "config.json").is_file():
            judges.append(ClassifierJudge(work / "stages" / "classifier", audio, device))
    transcriber = Transcriber(options["asr"], device) if options["asr"] else None
    if not judges and transcriber is None and options["hypotheses"] is None:
        raise UserError(f"nothing is at hand to judge with: name --judges, --clap or --asr, or a --work whose bundle has a CLAP ({bundle})")
    name = options["name"] or generated.resolve().name
    whole = options["listening"] == "audioldm_eval"
    found = score_folders(
        generated, options["reference"], judges, name=name, captions=options["captions"], channels=_channels(options),
        seconds=None if whole else seconds, hypotheses=options["hypotheses"], reader=options["reader"], transcriber=transcriber,
        made={name: value for name, value in made.items() if name != "candidates"},
        candidates=made["candidates"], ranker=options["ranker"], cache=work / "scores" / "cache",
    )  # fmt: skip
    output = options["output"] or work / "scores" / name
    write_records(output / "records", found.records)
    click.echo(found.table())
    click.echo(f"{len(found.records)} records: {os.path.relpath(output)}; put them beside others with `loa report`")


if __name__ == "__main__":
    main()
