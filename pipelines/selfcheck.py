"""JOB: check weights against what is known of them: counts, a generated sound, and a training step of every part.

For whoever has the published weights at hand: every line says what was expected and what was found.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from friendly import friendly, plain_sentence
from options import with_option
from pipelines.weights import frozen_of, released_folders, variant_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from pipelines.features.store import FeatureStore
    from stages.bundle import Components
    from stages.generator import AudioGenerator
    from stages.variants import Variant

# Parameters of the published networks, by the folders of `AudioLDM2Pipeline` (references.md#parameter-counts).
SOUND = {
    "text_encoder": 193_913_882,
    "text_encoder_2": 341_231_104,
    "projection_model": 1_184_256,
    "language_model": 124_439_808,
    "unet": 346_943_496,
    "vae": 55_376_873,
    "vocoder": 55_264_897,
}
LARGE = SOUND | {"unet": 718_012_296}
SPEECH = SOUND | {"text_encoder_2": 6_327_744, "projection_model": 604_800, "unet": 261_926_536}
PUBLISHED = {
    "audioldm2-full": SOUND,
    "audioldm2-ac": SOUND,
    "audioldm2-msd": SOUND,
    "audioldm2-full-large": LARGE,
    "audioldm2-ac-large": LARGE,
    "audioldm2-ljs": SPEECH,
    "audioldm2-ljs-pretrained": SPEECH,
}
NO_NUMBER = "no published number"
QUIETEST, LOUDEST = -60.0, -1.0  # dB of full scale, root mean square
HUM, NOISE = 1e-7, 0.9  # spectral flatness: of a single tone 0, of white noise 1
PARITY = 1e-3  # greatest difference of two waveforms within [-1, 1]
CLIPS = 4  # of the training steps
PROMPT, SENTENCE = "A dog barks in the rain.", "Hello there, how are you today?"


class Line(NamedTuple):
    """One thing that was checked; `fault` says in a sentence what is wrong, "" where nothing is."""

    what: str
    expected: str
    found: str
    fault: str = ""

    def text(self) -> str:
        """As it is printed."""
        return f"{'FAIL' if self.fault else 'ok  '} {self.what}: expected {self.expected}, found {self.found}"


def judged(what: str, expected: str, found: str, good: bool, otherwise: str) -> Line:
    """A line with the fault `otherwise` unless it is good."""
    return Line(what, expected, found, "" if good else otherwise)


def selfcheck(source: str, given: Mapping[str, str] | None = None, steps: int = 20, device: str | None = None) -> Iterator[Line]:
    """Check the weights of a hub id, a folder in diffusers' layout or a bundle, line by line.

    Args:
        given: weights by stage that it lacks: public folders have no AudioMAE, without which half of the training steps are left out.
        steps: of the generated sound.
        device: where it is generated and trained; by default a GPU if there is one.
    """
    from pipelines.import_weights import import_weights

    with tempfile.TemporaryDirectory(prefix="loa-selfcheck-") as place:
        work = Path(place)

        def imported() -> Iterator[Line]:
            import_weights(source, work, out=work / "bundle")
            yield Line("import", "every weight, none unknown, none of another shape", "so")

        yield from _guarded("import", imported)
        if (work / "bundle").is_dir():
            yield from _guarded("generation", lambda: _generation(work / "bundle", steps, device))
            yield from _guarded("training", lambda: _training(work / "bundle", given or {}, work, device))


def _guarded(what: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """The lines of a check; what it raises is one more."""
    try:
        yield from check()
    except Exception as error:  # whatever goes wrong in one check is its finding, and the others still count
        sentence = plain_sentence(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Line(what, "no error", type(error).__name__, sentence)


# ------------------------------------------------------------------------------------------------ counts and sound


def _generation(bundle: Path, steps: int, device: str | None) -> Iterator[Line]:
    from stages.generator import AudioGenerator

    generator = AudioGenerator.load(bundle, device)
    yield from _counts(generator.parts)
    yield from _sound(generator, steps)
    if generator.info.speech:
        yield Line("one denoising step in plain diffusers", "left out for speech", "nothing")
    else:
        yield from _parity(bundle, generator)


def _counts(parts: Components) -> Iterator[Line]:
    published = PUBLISHED.get(parts.info.variant, {})
    for name in SOUND:
        network: Any = getattr(parts, name)
        counted = network.text_encoder if name == "text_encoder_2" and parts.info.speech else network
        found, expected = sum(p.numel() for p in counted.parameters()), published.get(name)
        said = NO_NUMBER if expected is None else f"{expected:,}"
        fault = f"{name} has {found:,} parameters and the published one {said}: it is another network than {parts.info.variant} has"
        yield judged(f"parameters of {name}", said, f"{found:,}", expected in (None, found), fault)


def _sound(generator: AudioGenerator, steps: int) -> Iterator[Line]:
    """A sound that is one: finite, audible, neither a hum nor noise; the same for the same seed."""
    import numpy as np
    from scipy.signal import welch

    def made(seed: int) -> np.ndarray:
        words = SENTENCE if generator.info.speech else None
        sound: np.ndarray = generator.generate(PROMPT, transcriptions=words, seed=seed, num_inference_steps=steps)[0]
        return sound

    sound = made(0)
    share = float(np.isfinite(sound).mean())
    yield judged("samples that are numbers", "100 %", f"{share:.0%}", share == 1, "the sound holds NaN or infinity: weights are damaged")
    if share < 1:
        return
    level = 20 * np.log10(max(float(np.sqrt(np.mean(np.square(sound)))), 1e-10))
    wrong = f"the generated sound is {'silent' if level < QUIETEST else 'as loud as can be'}, {level:.0f} dB of full scale"
    yield judged("loudness", f"{QUIETEST:.0f} to {LOUDEST:.0f} dB", f"{level:.1f} dB", QUIETEST <= level <= LOUDEST, wrong)
    power = welch(sound, generator.sample_rate, nperseg=1024)[1] + 1e-20
    flatness = float(np.exp(np.log(power).mean()) / power.mean())
    wrong = f"the generated sound is {'a single tone' if flatness < HUM else 'white noise'}: spectral flatness {flatness:.2g}"
    yield judged("spectral flatness", f"{HUM:g} (a tone) to {NOISE:g} (noise)", f"{flatness:.2g}", HUM <= flatness <= NOISE, wrong)
    again, other = float(np.abs(made(0) - sound).max()), float(np.abs(made(1) - sound).max())
    on_cpu = generator.device.type == "cpu"
    wrong = f"the same seed gave another sound, by up to {again:.2g}"
    yield judged("the same seed", "the same sound", f"differs by {again:.2g}", again <= (0 if on_cpu else PARITY), wrong)
    yield judged(
        "another seed",
        "another sound",
        f"differs by {other:.2g}",
        other > 0,
        "another seed gave the very same sound",
    )


def _parity(bundle: Path, generator: AudioGenerator) -> Iterator[Line]:
    """One guided denoising step, from prompt to waveform, beside `diffusers.AudioLDM2Pipeline` on the same files, on the CPU."""
    import numpy as np
    import torch
    from diffusers import AudioLDM2Pipeline

    from stages.generator import AudioGenerator
    from stages.quiet import quiet

    same: dict[str, Any] = {"num_inference_steps": 1}
    ours = AudioGenerator.load(bundle, "cpu", torch.float32) if generator.device.type != "cpu" else generator
    mine = ours.generate(PROMPT, seed=0, profile="diffusers", **same)
    with quiet():
        pipeline = AudioLDM2Pipeline.from_pretrained(bundle, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, generator=[torch.Generator().manual_seed(0)], **same).audios
    apart = float(np.abs(mine - theirs).max())
    wrong = f"one denoising step differs from plain diffusers' by up to {apart:.2g}"
    yield judged("one denoising step in plain diffusers", f"at most {PARITY:g} apart", f"{apart:.2g}", apart <= PARITY, wrong)


# -------------------------------------------------------------------------------------------------- training steps


class Measure(NamedTuple):
    """The loss of a stage that is judged: its name among the logs, and what a network costs that has learned nothing."""

    log: str
    naive: Callable[[Mapping[str, Any]], float]
    words: str


def _deviation(values: Tensor) -> float:
    return float((values.float() - values.float().mean()).abs().mean())


MEASURES = {
    "clap": Measure("contrast", lambda batch: math.log(len(batch["waveform"])), "by chance"),
    "audiomae": Measure("reconstruction", lambda batch: 1.0, "by the mean of every patch"),
    "vae": Measure("mel_l1", lambda batch: _deviation(batch["mel"]), "by the mean of all mels"),
    "vocoder": Measure("mel_l1", lambda batch: 1.0, "one e-fold off in every bin"),
    "translator": Measure("loa", lambda batch: float(batch["loa"].abs().mean()), "by zeros"),
    "diffusion": Measure("noise", lambda batch: 1.0, "by zeros"),
    "joint": Measure("noise", lambda batch: 1.0, "by zeros"),
}


def _training(bundle: Path, given: Mapping[str, str], work: Path, device: str | None) -> Iterator[Line]:
    """Loss and gradient of one step of every stage, on a few made sounds whose features its own frozen networks compute."""
    import torch

    variant = _all_at_once(variant_of(bundle))
    frozen = frozen_of(bundle) | dict(given)
    store = _store_of_sounds(variant, frozen, work)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for stage in MEASURES:
        lacks = "audiomae" not in frozen and stage in ("audiomae", "translator", "diffusion", "joint")
        if lacks:
            yield Line(f"training {stage}", "left out without AudioMAE (--with audiomae=FOLDER_OR_HUB_ID)", "nothing")
            continue
        yield from _guarded(f"training {stage}", lambda stage=stage: _one_step(stage, variant, frozen, store, work, chosen))  # type: ignore[misc]


def _all_at_once(variant: Variant) -> Variant:
    """The variant with nothing left to chance: critics from the first step, conditions never dropped, the translator's own LOA."""
    return replace(
        variant,
        vae_loss=replace(variant.vae_loss, critic_start=0),
        vocoder_loss=replace(variant.vocoder_loss, critic_start=0),
        diffusion=replace(variant.diffusion, condition_dropout=0.0),
        joint=replace(variant.joint, ground_truth=0.0),
    )


def _store_of_sounds(variant: Variant, frozen: Mapping[str, str], work: Path) -> FeatureStore:
    """A store with a few made sounds, and what of their features can be made."""
    import numpy as np

    from pipelines.features.store import FeatureStore
    from pipelines.ingest import ingest
    from pipelines.preprocess import run_pass
    from stages.audio import write_wav

    rng, rate = np.random.default_rng(0), variant.audio.sample_rate
    t = np.arange(variant.audio.clip_samples) / rate
    rough = rng.standard_normal(len(t))
    sounds = {
        "a steady tone": np.sin(2 * np.pi * 440 * t),
        "hissing noise": rough,
        "a rising whistle": np.sin(2 * np.pi * (300 * t + 400 * t**2)),
        "short bursts of noise": rough * (np.sin(2 * np.pi * 3 * t) > 0.6),
    }
    recordings = work / "recordings"
    recordings.mkdir()
    rows = ["file,caption,transcript,split"]
    for i, (caption, sound) in enumerate(sounds.items()):
        write_wav(recordings / f"{i}.wav", (0.3 * sound / np.abs(sound).max()).astype(np.float32), rate)
        rows.append(f"{i}.wav,{caption},{SENTENCE.replace(',', '')},train")
    (recordings / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    ingest([recordings], work / "store", variant.audio, workers=0)
    store = FeatureStore.open(work / "store")
    folders = {name: folder for name, folder in released_folders(work, frozen).items() if name in frozen}
    passes = ("mel", *(("loa",) if "audiomae" in frozen else ()), "latent", "speech" if variant.phonemes else "text")
    for name in passes:
        run_pass(name, store, variant, folders, workers=0)
    return store


def _one_step(stage: str, variant: Variant, frozen: Mapping[str, str], store: FeatureStore, work: Path, device: str) -> Iterator[Line]:
    import torch

    from pipelines.training.checkpoint import Progress
    from pipelines.training.dataset import ClipDataset, Examples, Share, step_rng, training_batches
    from pipelines.training.job import TrainJob
    from pipelines.weights import start_folder
    from stages.base import stage_class
    from stages.starting import start_from

    cls = stage_class(stage)
    clips = ClipDataset(store, cls, cls.reads(variant), "train")
    job = TrainJob(stage, variant, store.root, str(work / "runs" / stage), frozen, str(work / "unused"))
    start = start_folder(stage, frozen[stage if stage != "joint" else "diffusion"]).local_copy()
    prepared = Path(job.run) / "prepared"
    prepared.mkdir(parents=True)
    cls.prepare(variant, job.folder, clips, prepared, start)
    torch.manual_seed(0)
    network = cls.build(variant, job.folder)
    fresh = start_from(network, start, str(start), ["missing"] if stage == "audiomae" else []).fresh  # it may have lost its decoder
    known = variant.name in PUBLISHED and not (stage == "audiomae" and fresh)
    network.to(device).train()
    recipe = replace(job.recipe, global_batch=CLIPS, micro_batch=None)
    batch = next(training_batches(Examples(clips, network, 0), clips.order(0), recipe, Share(0, 1), Progress()))[0]
    batch = {name: values.to(device) for name, values in batch.items()} | {"step_rng": step_rng(0, 0), "step": 0}
    for part, loss, logs in network.losses(batch):
        network.zero_grad()
        loss.backward()
        if MEASURES[stage].log in logs:
            yield _loss_line(stage, float(logs[MEASURES[stage].log].detach()), MEASURES[stage].naive(batch), known)
        yield _gradient_line(stage, part, network.parts()[part])


def _loss_line(stage: str, loss: float, naive: float, published: bool) -> Line:
    """Published weights have learned something: they must do better than one who has learned nothing."""
    measure = MEASURES[stage]
    known = f"0 to {naive:.3g} (what it costs {measure.words})"
    expected = known if published else f"a finite number ({NO_NUMBER}; {naive:.3g} {measure.words})"
    good = math.isfinite(loss) and (not published or 0 <= loss < naive)
    wrong = f"the loss of {stage} is {loss:.3g}, expected {expected}: its weights are damaged or do not belong to the others"
    return judged(f"training {stage}: {measure.log}", expected, f"{loss:.3g}", good, wrong)


def _gradient_line(stage: str, part: str, network: nn.Module) -> Line:
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    lost = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())]
    wrong = f"no finite gradient reaches {len(lost)} tensors of {stage}'s {part}, such as {', '.join(lost[:3])}"
    reached = f"{len(trained) - len(lost)}"
    return judged(f"training {stage}: gradient of {part}", f"in all of {len(trained)} tensors", f"in {reached}", not lost, wrong)


@click.command()
@click.argument("source", metavar="HUB_ID|FOLDER")
@with_option
@click.option("--steps", type=click.IntRange(1, 999), default=20, show_default=True, help="Denoising steps of the generated sound.")
@click.option("--device", metavar="NAME", help="Device, such as cpu, cuda or cuda:1.  [default: a GPU if there is one]")
@friendly
def main(source: str, released: dict[str, str], steps: int, device: str | None) -> None:
    """Check weights: parameter counts, a generated sound, one training step of every part.

    HUB_ID|FOLDER is a published AudioLDM 2 (such as cvssp/audioldm2), a folder in the layout of diffusers, or a bundle. Every line says
    what was expected and what was found; the exit status is 1 when one fails. Nothing is kept.
    """
    faults = []
    for line in selfcheck(source, released, steps, device):
        click.echo(line.text())
        faults += [line.fault] if line.fault else []
    if faults:
        click.echo("\n" + "\n".join(f"Error: {fault}" for fault in faults), err=True)
        sys.exit(1)
    click.echo("\nall as expected")


if __name__ == "__main__":
    main()
