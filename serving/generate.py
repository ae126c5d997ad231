"""`loa generate`: the sound of a prompt as a file, without a server."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from friendly import friendly
from options import PlaceType, next_step, sampling_options, shown
from stages.errors import UserError
from stages.files import Place, replacing
from stages.sampling import resolve

FORMATS = {".wav": "WAV", ".flac": "FLAC"}


def output_files(out: Path | None, prompt: str, count: int, force: bool) -> list[Path]:
    """Where the sounds of a prompt go: `out` itself, or numbered beside it when there are several.

    Raises UserError for a format that is not written, a missing folder, or a file that would be overwritten.
    """
    if out is None:
        words = re.findall(r"\w+", prompt.lower())
        out = Path(f"{'-'.join(words)[:60].rstrip('-') or 'sound'}.wav")
    if out.suffix.lower() not in FORMATS:
        raise UserError(
            f"{out} has the unsupported extension {out.suffix or '(none)'!r}; choose a name that ends in {' or '.join(FORMATS)}"
        )
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist; create it or choose another with -o")
    files = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]
    taken = [str(file) for file in files if file.exists()]
    if taken and not force:
        raise UserError(f"{', '.join(taken)} exists; overwrite with --force or choose another name with -o")
    return files


def write_sound(path: Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Write a waveform [T] as 16 bits, so that a reader sees the whole file or none."""
    import soundfile

    with replacing(path) as draft:
        soundfile.write(draft, np.clip(waveform, -1.0, 1.0), sample_rate, format=FORMATS[path.suffix.lower()], subtype="PCM_16")


@click.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="WAV or FLAC file to write.  [default: a name made of the prompt's words]",
)
@click.option(
    "--bundle",
    type=PlaceType(),
    metavar="DIR",
    help="Bundle, a folder or URL.  [default: $LOA_BUNDLE, or the newest under ./outputs]",
)
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    metavar="FOLDER[=SCALE]",
    help="Apply LoRA adapters, at a scale from 0 (not at all) to 1 (as trained) and beyond. May be repeated.  [default: none]",
)
@click.option("--seconds", type=float, help="Length in seconds.  [default: the clip length of the bundle]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed; the same seed gives the same sound.")
@click.option("--negative-prompt", metavar="TEXT", help="What the sound should not contain.  [default: none]")
@click.option(
    "--transcription", metavar="TEXT", help="Text to speak, with a speech model; the prompt then describes the voice.  [default: none]"
)
@click.option("--num", type=click.IntRange(1), default=1, show_default=True, help="Number of sounds to write.")
@sampling_options()
@click.option("--peak", type=click.FloatRange(0, 1, min_open=True), help="Normalise every sound to this peak.  [default: not normalised]")
@click.option("--device", metavar="NAME", help="Device, such as cpu, cuda or cuda:1.  [default: a GPU if there is one]")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@friendly
def main(
    prompt: str,
    out: Path | None,
    bundle: Place | None,
    adapters: tuple[str, ...],
    seconds: float | None,
    seed: int,
    negative_prompt: str | None,
    transcription: str | None,
    num: int,
    sampling: dict[str, Any],
    peak: float | None,
    device: str | None,
    force: bool,
) -> None:
    """Generate the sound of PROMPT and write it to a file.

    \b
      loa generate "a dog barks in the rain" -o dog.wav
      loa generate "calm piano" --seconds 20 --num 2 --candidates 6
      loa generate "rain" --profile authors --steps 100
      loa generate "rain on my roof" --lora mine/adapters/joint=0.8
    """
    from stages.bundle import find_bundle
    from stages.lora import Adapter

    candidates = sampling.get("candidates", num)
    if candidates < num:
        raise UserError(f"{num} sounds cannot be chosen from {candidates} candidates; raise --candidates")
    chosen = resolve(**sampling)
    files = output_files(out, prompt, num, force)
    wanted = [Adapter.of(text) for text in adapters]
    folder = find_bundle(bundle or next((base for each in wanted if (base := each.trained_on()) is not None), None))
    for each in wanted:
        if not each.fits(folder):
            click.echo(f"Note: {each.folder} was trained on other weights than those of {shown(folder)}; the sound may suffer", err=True)

    from stages.generator import AudioGenerator

    generator = AudioGenerator.load(folder, device, adapters=wanted)
    with tqdm(total=chosen.num_inference_steps, unit="step", desc=generator.info.variant, leave=False) as bar:

        def progress(step: int, total: int) -> None:
            bar.total = total
            bar.update(step - bar.n)

        began = time.monotonic()
        waveforms = generator.generate(
            prompt,
            negative_prompts=negative_prompt,
            transcriptions=transcription,
            seconds=seconds,
            seed=seed,
            num_waveforms_per_prompt=num,
            progress=progress,
            **sampling,
        )
    took = time.monotonic() - began
    for file, waveform in zip(files, waveforms, strict=True):
        if peak is not None:
            waveform = waveform * (peak / max(float(np.abs(waveform).max()), 1e-8))
        write_sound(file, waveform, generator.sample_rate)
        click.echo(f"{file}: {len(waveform) / generator.sample_rate:.2f} s at {generator.sample_rate} Hz, seed {seed}")
    click.echo(f"{max(num, chosen.candidates)} generated in {took:.1f} s")
    click.echo(next_step("generate"))


if __name__ == "__main__":
    main()
