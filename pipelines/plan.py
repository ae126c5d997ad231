"""JOB: what features of so many hours take on this machine or on several: clips, bytes, hours, from measured rates."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from friendly import friendly
from options import again, set_option, tiny_option, variant_option, with_option, work_option
from pipelines.tables import aligned
from pipelines.weights import card_beside, released_folders
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.features.rates import Rate
    from stages.variants import Variant

PASSES = {"mel": "", "loa": "audiomae", "latent": "vae", "text": "clap", "speech": "clap"}  # pass → the stage that encodes


def measure_passes(variant: Variant, work: Place, seconds: float, released: dict[str, str], data: Path | None = None) -> list[Rate]:
    """Time every pass of a variant on this machine for `seconds` each, and keep the rates in the work folder."""
    from pipelines.features.passes import LatentPass, LoaPass, MelPass, SpeechPass, TextPass
    from pipelines.features.rates import keep_rates, made_rows, measure, random_weights
    from stages.translator.model import PhonemeEncoderConfig

    there = released_folders(work, released)
    folders = {stage: folder for stage, folder in there.items() if stage in released or card_beside(folder).get("variant") == variant.name}
    rates = []
    with tempfile.TemporaryDirectory(prefix="loa-plan-") as scratch:
        rows = recordings(data, variant) if data else made_rows(Path(scratch), variant.audio)
        for name in passes_of(variant):
            stage = PASSES[name]
            folder = folders.get(stage) or (random_weights(stage, variant, Path(scratch)) if stage else None)
            longest = (variant.phonemes or PhonemeEncoderConfig()).max_length
            made: dict[str, Any] = {
                "mel": lambda f: MelPass(variant.audio),
                "loa": lambda f: LoaPass(variant.audio, f, variant.diffusion.poolings),
                "latent": lambda f: LatentPass(variant.audio, f),
                "text": lambda f: TextPass(variant.audio, f),
                "speech": lambda f, longest=longest: SpeechPass(variant.audio, f, longest),
            }
            weights = "none" if not stage else "trained" if stage in folders else "random"
            rates.append(measure(made[name](folder), variant, rows, seconds, str(data) if data else "made", weights))
            keep_rates(work, rates)
    return rates


def passes_of(variant: Variant) -> list[str]:
    """The passes whose series a variant trains on."""
    return [name for name in PASSES if name != ("text" if variant.phonemes else "speech")]


def recordings(data: Path, variant: Variant, count: int = 32) -> list[dict[str, Any]]:
    """Rows of the first `count` recordings of a folder that can be read, with captions where they have none. Raises UserError when
    there is none."""
    from pipelines.corpora import Recording, discover, read
    from pipelines.corpora.headers import probe_header
    from pipelines.features.rates import made_captions, row_of

    rows: list[dict[str, Any]] = []
    texts = made_captions(count)
    for corpus, root in discover(data):
        for record in read(corpus, root):
            if isinstance(record, Recording) and len(rows) < count:
                seconds, problem = probe_header(record.path)
                if not problem:
                    text = record.captions[0] if record.captions else texts[len(rows)]
                    rows.append(row_of(record.path, min(seconds, variant.audio.clip_seconds), text))
    if not rows:
        raise UserError(f"{data} holds no recording that can be read; give --data another folder, or leave it out to measure on made clips")
    return rows


def hours_in(data: Path) -> float:
    """Hours of the recordings in a folder, by their headers."""
    from pipelines.corpora import Recording, discover, read
    from pipelines.corpora.headers import probe_headers

    paths = sorted({r.path for corpus, root in discover(data) for r in read(corpus, root) if isinstance(r, Recording)})
    return sum(file.seconds for _, file in probe_headers(paths, len(paths), 0)) / 3600


def describe(variant: Variant, hours: float, clips: int, nodes: int, poolings: Sequence[int], rates: Sequence[Rate]) -> str:
    """Clips, bytes per series, and hours of each pass on every machine that was measured, as text."""
    from pipelines.features.rates import machine
    from pipelines.features.spend import hours_of, series_bytes, size_text

    sizes = series_bytes(variant, poolings)
    rows = [["series", "a clip", "all"]]
    rows += [[name, f"{size / 1e3:,.1f} kB", size_text(clips * size)] for name, size in sizes.items()]
    rows.append(["together", f"{sum(sizes.values()) / 1e3:,.1f} kB", size_text(clips * sum(sizes.values()))])
    lines = [f"{variant.name}: {hours:,.1f} h, {clips:,} clips of {variant.audio.clip_seconds:g} s", "", aligned(rows)]
    names, here = passes_of(variant), machine()
    known = [rate for rate in rates if rate.variant == variant.name and rate.name in names]
    if known:
        table = [["pass", "clips/s", "x real time", "hours", f"on {nodes} nodes", "measured on"]]
        for rate in known:
            spent = [f"{hours_of(clips, rate.clips_per_second, n):,.1f} h" for n in (1, nodes)]
            where = rate.machine + (" (this machine)" if rate.machine == here else "") + f", {rate.date}"
            table.append([rate.name, f"{rate.clips_per_second:,.2f}", f"{rate.times_real:,.0f}", *spent, where])
        lines += ["", aligned(table, remarks=1)]
    lacking = [name for name in names if name not in {rate.name for rate in known if rate.machine == here}]
    if lacking:
        lines += ["", f"never measured on this machine ({here}): {', '.join(lacking)}; {again('loa plan --measure')} measures them"]
    return "\n".join(lines)


@click.command()
@work_option
@variant_option
@tiny_option
@set_option
@with_option
@click.option("--measure", is_flag=True, help="Time every pass on this machine first; rates are kept in --work.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="With --measure: for each pass.")
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    metavar="H",
    help="Plan for so many hours of sound.  [default: what --data or --store holds]",
)
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="DIR", help="Plan for (and measure on) these recordings.  [default: made clips]"
)
@click.option("--store", metavar="DIR", help="Plan for the clips of this feature store.  [default: none]")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines like the measured one.")
@friendly
def main(
    work: Place,
    variant: str,
    tiny: bool,
    settings: dict[str, str],
    released: dict[str, str],
    measure: bool,
    seconds: float,
    hours: float | None,
    data: Path | None,
    store: str | None,
    nodes: int,
) -> None:
    """Plan before you spend: clips, bytes per series and hours per pass, from rates that were measured.

    For passes over a store that is there, `loa preprocess PASS --dry-run` says what is left to do.
    """
    from pipelines.features.rates import read_rates
    from pipelines.features.spend import clip_count
    from pipelines.features.store import FeatureStore
    from stages.variants import resolve

    system = resolve(variant, tiny, settings)
    if measure:
        for rate in measure_passes(system, work, seconds, released, data):
            click.echo(
                f"{rate.name}: {rate.clips_per_second:,.2f} clips/s, {rate.times_real:,.0f} x real time, {rate.device}, {rate.clips} clips"
            )
    if sum(given is not None for given in (hours, data, store)) > 1:
        raise UserError("--hours, --data and --store each say how much there is; give one of them")
    if store is not None:
        clips = FeatureStore.open(store).num_clips
        amount = clips * system.audio.clip_seconds / 3600
    elif data is not None or hours is not None:
        amount = hours_in(data) if data is not None else float(hours or 0)
        clips = clip_count(amount, system.audio.clip_seconds)
    elif measure:
        return
    else:
        raise UserError("say how much there is, with --hours H, --data DIR or --store DIR; or measure this machine with --measure")
    poolings = sorted({1, *system.diffusion.poolings, system.translator.pooling})
    click.echo(describe(system, amount, clips, nodes, poolings, read_rates(work)))


if __name__ == "__main__":
    main()
