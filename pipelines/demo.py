"""JOB: the whole pipeline on a small corpus: recordings → shards → trained stages → bundle → sound, scores and a report.

Every step finds out by itself whether it is done, so a second call continues where the first one stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil

from friendly import friendly
from options import (
    AS_NEEDED,
    PlaceType,
    Reservation,
    WorkerRange,
    require_disk,
    require_memory,
    set_option,
    shown,
    tracking_option,
    worker_options,
    works_on,
)
from pipelines import cluster
from pipelines.tracking import Tracker
from stages.config import to_dict
from stages.errors import UserError
from stages.files import Place, write_json

if TYPE_CHECKING:
    from pipelines.training.launch import Crew
    from stages.variants import Variant

MEMORY_GB, DISK_GB = 6.0, 4.0  # measured peak and footprint of the default preset, rounded up (docs/log.md)


@dataclass(frozen=True)
class Preset:
    """How much of everything: sizes of corpus and evaluation, and settings of the tiny variant."""

    summary: str
    clips_per_kind: int
    evaluated_clips: int
    sampling_steps: int
    minutes: dict[str, float]  # what each step took on two cores; for the time left
    settings: dict[str, str]


@dataclass
class Step:
    """One step of the line."""

    name: str
    title: str
    run: Callable[[Tracker], str]  # returns one line on what came out


class Demo:
    """The line from recordings to report in one project folder."""

    def __init__(
        self,
        work: Path,
        data: Path | None,
        variant: Variant,
        preset: Preset,
        workers: WorkerRange,
        tracking_uri: str | None,
        seed: int,
        reserve: Reservation = AS_NEEDED,
    ) -> None:
        self.work, self.data, self.variant, self.preset = work, data, variant, preset
        self.workers, self.reserve, self.tracking_uri, self.seed = workers, reserve, tracking_uri, seed
        self._crew: Crew | None = None  # of the stages that are trained one after another

    # ------------------------------------------------------------------------------------------------- the steps

    def steps(self) -> list[Step]:
        """All steps in order."""
        speech = self.variant.phonemes is not None
        text = ("speech", "voices and phonemes") if speech else ("text", "CLAP and T5 states of every caption")
        train = [Step(f"train-{s}", t, partial(self._train, s)) for s, t in _TRAINED_FIRST]
        later = [Step(f"train-{s}", t, partial(self._train, s)) for s, t in _TRAINED_LATER]
        first = [] if self.data else [Step("corpus", "make the demo's recordings", self._corpus)]
        return [
            *first,
            Step("ingest", "recordings → clip table", self._ingest),
            Step("mel", "decode, log-mel and waveform shards", partial(self._pass, "mel")),
            *train,
            Step("loa", "language of audio of every clip", partial(self._pass, "loa")),
            Step("latent", "VAE latents of every clip", partial(self._pass, "latent")),
            Step(*text, partial(self._pass, text[0])),
            *later,
            Step("export", "bundle for diffusers and serving", self._export),
            Step("evaluate", "generate for held-out captions and score", self._evaluate),
            Step("report", "report.html", self._report),
        ]

    def _corpus(self, tracker: Tracker) -> str:
        from pipelines.demo_corpus.make import make_demo_corpus

        folder, count = self.work / "recordings", self.preset.clips_per_kind
        if self.variant.phonemes is None:
            made = make_demo_corpus(folder, self.seed, count, self.variant.audio.clip_seconds)
        else:  # a voice is to be learnt: mostly sentences, in both speech layouts
            made = make_demo_corpus(folder, self.seed, max(4, count // 10), self.variant.audio.clip_seconds, speech=5 * count)
        return f"{made} in {shown(folder)}"

    def _ingest(self, tracker: Tracker) -> str:
        from pipelines.features.store import FeatureStore
        from pipelines.features.summary import log_ingest
        from pipelines.ingest import ingest

        report = ingest([self.data or self.work / "recordings"], str(self.work / "store"), self.variant.audio, seed=self.seed)
        log_ingest(tracker, FeatureStore.open(report.store), report.counts())
        return report.summary()

    def _pass(self, name: str, tracker: Tracker) -> str:
        from pipelines.preprocess import run_pass

        report = run_pass(
            name, str(self.work / "store"), variant=self.variant, work=self.work, reserve=self.reserve, tracker=lambda: tracker
        )
        return f"{report.clips} clips, {report.rejected} rejected"

    def _train(self, stage: str, tracker: Tracker) -> str:
        from pipelines.train import train_stage
        from stages.base import read_card

        if stage == "classifier" and not self._has_labels():
            return "skipped: the recordings have no labels; CLAP scores remain"
        # In minutes by the clock more steps are worth more than the last bits of the sound.
        settings: dict[str, Any] = {"tracker": tracker, "seed": self.seed, "precision": "fast", "crew": self._crew}
        folder = train_stage(stage, self.variant, self.work, **settings)
        card = read_card(folder, stage)
        measures = ", ".join(f"{k} {v:.3g}" for k, v in card["validation"].items())
        return f"{card['steps']} steps, held out: {measures}"

    def _has_labels(self) -> bool:
        """Whether the training clips have labels of two kinds at least, without which there is nothing to tell apart."""
        from pipelines.features.store import FeatureStore
        from pipelines.training.dataset import ClipDataset
        from stages.base import stage_class

        classifier = stage_class("classifier")
        clips = ClipDataset(FeatureStore.open(str(self.work / "store")), classifier, classifier.reads(self.variant), "train")
        return classifier.learns_from(clips)

    def _export(self, tracker: Tracker) -> str:
        from pipelines.export import export

        bundle = export(self.work, self.variant, force=True)  # an older one here can only be this demo's own
        tracker.register(bundle, name=f"loa-{self.variant.name}")
        return shown(bundle)

    def _evaluate(self, tracker: Tracker) -> str:
        from pipelines.evaluation.clips import Selection
        from pipelines.evaluation.run import evaluate

        evaluation = evaluate(
            self.work,
            Selection(self.preset.evaluated_clips, seed=self.seed),
            {"num_inference_steps": self.preset.sampling_steps},
            tracker=tracker,
        )
        return evaluation.summary()

    def _report(self, tracker: Tracker) -> str:
        from pipelines.report import write_report

        path = write_report(self.work, tracking_uri=self.tracking_uri).path
        tracker.artifact(path)
        return shown(path)

    # ---------------------------------------------------------------------------------------------- running them

    def run(self) -> None:
        """Run what is not done yet, telling what happens and how long it still takes."""
        from pipelines.training.launch import Crew

        self._check_same()
        steps = self.steps()
        with Tracker.open(self.tracking_uri, work=self.work, job="demo", variant=self.variant.name) as parent:
            numbered = enumerate(steps, 1)
            for _, neighbours in itertools.groupby(numbered, lambda item: item[1].name.startswith("train-")):
                # Stages that follow each other share their workers; the passes between want their CPUs.
                with Crew(1 if self.workers is None else self.workers, self.reserve) as self._crew:
                    for number, step in neighbours:
                        left = sum(self.preset.minutes.get(s.name, 0.2) for s in steps[number - 1 :])
                        click.secho(f"[{number}/{len(steps)}] {step.title}", bold=True, nl=False)
                        click.echo(f"  ({step.name}; about {_minutes(left)} left)")
                        note = self._take(step, parent)
                        click.echo(f"      {note['note']}  [{note['seconds']:.0f} s]")

    def _take(self, step: Step, parent: Tracker) -> dict[str, Any]:
        """Run one step under the demo's own run of MLflow; returns its line of steps.json."""
        with (
            self._measured(step.name) as note,
            Tracker.open(self.tracking_uri, work=self.work, job=step.name, variant=self.variant.name, parent=parent) as tracker,
        ):
            tracker.params(self._parameters(step.name))
            note["note"] = step.run(tracker)
        return note

    def _parameters(self, step: str) -> dict[str, Any]:
        config = to_dict(self.variant)
        stage = step.removeprefix("train-")
        if stage in config["recipes"] and step.startswith("train-"):
            return {"model": config.get(stage), "recipe": config["recipes"][stage]}
        return {"audio": config["audio"]}

    @contextlib.contextmanager
    def _measured(self, name: str) -> Iterator[dict[str, Any]]:
        """Wall time and peak memory of a step, summed and maximised over restarts, into steps.json."""
        note: dict[str, Any] = {"note": "", "seconds": 0.0}
        began = time.monotonic()
        with PeakMemory() as memory:
            yield note
        note["seconds"] = time.monotonic() - began
        path = self.work / "steps.json"
        rows = json.loads(path.read_text()) if path.is_file() else []
        row = next((r for r in rows if r["step"] == name), None)
        if row is None:
            rows.append({"step": name, "seconds": note["seconds"], "peak_memory_mb": memory.peak_mb, "note": note["note"]})
        else:
            row |= {
                "seconds": row["seconds"] + note["seconds"],
                "peak_memory_mb": max(row["peak_memory_mb"], memory.peak_mb),
                "note": note["note"],
            }
        write_json(path, rows)

    def _check_same(self) -> None:
        """One folder, one demo: other data, variant or preset would mix two runs."""
        path = self.work / "demo.json"
        now = {"data": str(self.data) if self.data else None, "variant": json.loads(json.dumps(to_dict(self.variant))), "seed": self.seed}
        del now["variant"]["name"]
        if path.is_file():
            before = json.loads(path.read_text())
            before["variant"].pop("name", None)  # earlier versions kept it; the settings say all
            if before != now:
                raise UserError(
                    f"{self.work} holds a demo with other data, variant, preset or settings; continue it with the options it was "
                    "started with, or choose another folder with --work"
                )
            return
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


_TRAINED_FIRST = (
    ("classifier", "classifier for evaluation (trained on real clips only)"),
    ("clap", "CLAP and T5: words ↔ sounds"),
    ("audiomae", "AudioMAE: masked spectrograms"),
    ("vae", "VAE: mel ↔ latent"),
    ("vocoder", "HiFi-GAN: mel → waveform"),
)
_TRAINED_LATER = (
    ("translator", "GPT-2: words → language of audio"),
    ("diffusion", "T-UNet: language of audio → latent"),
    ("joint", "both together"),
)


class PeakMemory:
    """Peak proportional memory (PSS) of this process and its children, sampled every five seconds."""

    def __enter__(self) -> PeakMemory:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
            self.peak_mb = max(self.peak_mb, total / 1e6)
            if self._stop.wait(5.0):  # reading the maps of a process holds its memory lock
                return


def _minutes(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes >= 1.5 else f"{max(5, 60 * minutes):.0f} s"


# What each step of the quick preset takes on two cores, for the time left.
_QUICK_MINUTES = {
    "corpus": 0.3,
    "ingest": 0.1,
    "mel": 0.3,
    "train-classifier": 0.5,
    "train-clap": 1.3,
    "train-audiomae": 1.0,
    "train-vae": 3.7,
    "train-vocoder": 3.6,
    "loa": 0.3,
    "latent": 0.5,
    "text": 0.3,
    "train-translator": 0.8,
    "train-diffusion": 3.1,
    "train-joint": 1.3,
    "export": 0.1,
    "evaluate": 0.6,
    "report": 0.1,
}

PRESETS = {
    "quick": Preset(
        summary="about twenty minutes on two cores",
        clips_per_kind=90,
        evaluated_clips=60,
        sampling_steps=25,
        minutes=_QUICK_MINUTES,
        settings={},
    ),
    "full": Preset(
        summary="an hour and a half on two cores, for better sound",
        clips_per_kind=200,
        evaluated_clips=120,
        sampling_steps=50,
        minutes=_QUICK_MINUTES
        | {"train-clap": 5.4, "train-audiomae": 3.7, "train-vae": 19.0, "train-vocoder": 19.0, "train-translator": 3.0}
        | {"train-diffusion": 26.0, "train-joint": 9.0, "evaluate": 3.0},
        settings={
            "recipes.clap.steps": "2500",
            "recipes.clap.max_seconds": "300",
            "recipes.audiomae.steps": "1500",
            "recipes.audiomae.max_seconds": "200",
            "recipes.vae.steps": "10000",
            "recipes.vae.max_seconds": "1100",
            "vae_loss.critic_start": "4000",
            "recipes.vocoder.steps": "12000",
            "recipes.vocoder.max_seconds": "1100",
            "vocoder_loss.critic_start": "6000",
            "recipes.translator.steps": "2000",
            "recipes.translator.max_seconds": "150",
            "recipes.diffusion.steps": "6000",
            "recipes.diffusion.max_seconds": "1500",
            "recipes.joint.steps": "2000",
            "recipes.joint.max_seconds": "500",
        },
    ),
}


@click.command()
@click.option(
    "--work",
    type=PlaceType(),
    envvar="LOA_WORK",
    metavar="DIR",
    help="Project folder of the demo.  [default: outputs/demo, or outputs/demo-VARIANT, -PRESET, -DATA]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of your own recordings, in any known layout.  [default: a corpus that the demo synthesises]",
)
@click.option(
    "--variant",
    default="audioldm2-full",
    show_default=True,
    metavar="NAME",
    help="Which system to train; the demo always uses its tiny configuration.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="quick",
    show_default=True,
    help="; ".join(f"{k}: {p.summary}" for k, p in PRESETS.items()),
)
@worker_options
@click.option("--seed", default=0, show_default=True, help="Seed of the corpus, of training and of generation.")
@set_option
@tracking_option
@friendly
def main(
    work: Place | None,
    data: Path | None,
    variant: str,
    preset: str,
    workers: WorkerRange,
    reserve: Reservation,
    seed: int,
    settings: dict[str, str],
    tracking_uri: str | None,
) -> None:
    """Run the whole pipeline on a small corpus, from recordings to sound."""
    from pipelines.evaluation.results import Evaluation
    from stages.variants import resolve

    chosen = PRESETS[preset]
    resolved = resolve(variant, tiny=True, settings=chosen.settings | settings)
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is not a folder; name the folder that holds your recordings")
    folder_here = work.local_path("the demo") if work is not None else _default_work(variant, preset, data).absolute()
    works_on(resolved.name, folder_here)
    require_disk(folder_here, DISK_GB)
    require_memory(MEMORY_GB)
    cluster.connect()
    began = time.monotonic()
    demo = Demo(folder_here, data.absolute() if data else None, resolved, chosen, workers, tracking_uri, seed, reserve)
    demo.run()
    folder = shown(folder_here)
    click.echo()
    if (evaluation := Evaluation.read(folder_here)) is not None:
        click.echo(evaluation.table())
    click.secho(f"done in {_minutes((time.monotonic() - began) / 60)}", bold=True)
    click.echo(f"  listen and look   {folder}/report.html")
    click.echo(f"  every step        mlflow ui --backend-store-uri {tracking_uri or f'sqlite:///{folder}/mlflow.db'}")
    click.echo(f'  make a sound      loa generate "a dog barks" --bundle {folder}/bundle -o dog.wav')
    click.echo(f"  serve it          loa serve --bundle {folder}/bundle")


def _default_work(variant: str, preset: str, data: Path | None) -> Path:
    name = "demo" + (f"-{variant.removeprefix('audioldm2-')}" if variant != "audioldm2-full" else "")
    name += f"-{preset}" if preset != "quick" else ""
    return Path("outputs") / (name + (f"-{data.resolve().name}" if data else ""))


if __name__ == "__main__":
    main()
