"""JOB: the passes that fill the feature store, `loa preprocess mel | loa | latent | text | speech`.

Each pass makes the shards that the store lacks, so it can be stopped and started again, on another number of workers
too. The encoders are the stages trained in the work folder, or whatever `--with` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from options import again, friendly, next_step, set_option, tiny_option, variant_option, with_option, work_option
from pipelines import cluster
from pipelines.weights import released_folders, require_used
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.features.passes import Pass
    from pipelines.features.run import PassReport
    from pipelines.features.store import FeatureStore
    from stages.variants import Variant


class PassSummary(NamedTuple):
    """What a command must know of its pass before it does any work."""

    encoder: str  # the stage whose weights it needs; "" for none
    help: str


PASSES = {
    "mel": PassSummary("", "Recordings -> normalised waveform (FLAC) and log-mel spectrogram of every clip."),
    "loa": PassSummary("audiomae", "Waveforms -> the language of audio: AudioMAE features pooled at every given λ, from one forward pass."),
    "latent": PassSummary("vae", "Log-mel spectrograms -> mean and standard deviation of the VAE's posterior, unscaled."),
    "text": PassSummary("clap", "Captions (or labels) -> CLAP embeddings and T5 states of all texts of a clip."),
    "speech": PassSummary("clap", "Spoken clips -> CLAP embedding of the speaker and phonemes of the transcript; others are left out."),
}


def run_pass(
    name: str,
    store: FeatureStore | str | Place,
    variant: Variant,
    released: Mapping[str, Path | Place] | None = None,
    *,
    work: Path | Place | None = None,
    poolings: Sequence[int] | None = None,
    workers: int | None = None,
    limit_shards: int | None = None,
    progress: bool = True,
) -> PassReport:
    """Make the missing shards of one pass on the joined Ray cluster, or on one started here.

    Args:
        name: mel, loa, latent, text or speech.
        store: the feature store, or where it lies.
        released: folders of weights by stage; every pass but mel needs one.
        work: the project folder whose trained stages serve where `released` names none.
        poolings: λ of the loa pass; by default what the variant's stages read.
        workers: shards at once; by default what the cluster has room for.
        limit_shards: stop after this many shards.
        progress: show a bar on stderr.
    """
    from pipelines.features.run import execute
    from pipelines.features.store import FeatureStore

    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    folders = (released_folders(work, {}) if work else {}) | dict(released or {})
    chosen = build_pass(name, variant, folders, poolings)
    cluster.connect()
    return execute(chosen, opened, workers=workers, limit_shards=limit_shards, progress=progress)


def build_pass(
    name: str, variant: Variant, released: Mapping[str, Path | Place] | None = None, poolings: Sequence[int] | None = None
) -> Pass:
    """The pass called `name` with the variant's settings and the encoder among `released`.

    Raises UserError when its encoder is not there.
    """
    from pipelines.features.passes import LatentPass, LoaPass, MelPass, SpeechPass, TextPass
    from stages.translator.model import PhonemeEncoderConfig

    kinds: dict[str, type[Pass]] = {kind.name: kind for kind in (MelPass, LoaPass, LatentPass, TextPass, SpeechPass)}
    kind = kinds[name]
    if not kind.encoder:
        return kind(variant.audio)
    if not released or kind.encoder not in released:
        raise UserError(
            f"the {name} pass needs the weights of {kind.encoder}; train them with `loa train {kind.encoder}`, "
            f"or give them with `--with {kind.encoder}=FOLDER_OR_HUB_ID`"
        )
    folder = Place.of(released[kind.encoder])  # workers run in folders of their own
    if kind is LoaPass:
        wanted = poolings or default_poolings(variant)
        for pooling in wanted:
            _check_pooling(variant, pooling)
        return LoaPass(variant.audio, folder, wanted)
    if kind is SpeechPass:
        return SpeechPass(variant.audio, folder, (variant.phonemes or PhonemeEncoderConfig()).max_length)
    return kind(variant.audio, folder)


def default_poolings(variant: Variant) -> tuple[int, ...]:
    """λ = 1, from which the diffusion stage pools further itself, and what the translator predicts."""
    return tuple(sorted({1, variant.translator.pooling}))


def _check_pooling(variant: Variant, pooling: int) -> None:
    frames, bins = variant.loa_grid
    if pooling < 1 or frames % pooling or bins % min(pooling, bins):
        raise UserError(f"--pooling {pooling} does not divide AudioMAE's {frames} x {bins} grid of a clip; choose 1, 2, 4 or 8")


# ------------------------------------------------------------------------------------------------------------ commands


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,8") from None


def _pass_command(name: str) -> click.Command:
    """The command of one pass; they share all options but --pooling."""

    @friendly
    def command(
        work: Place,
        variant: str,
        tiny: bool,
        settings: dict[str, str],
        store_url: str | None,
        workers: int | None,
        limit_shards: int | None,
        verify: bool,
        released: dict[str, str] | None = None,
        poolings: tuple[int, ...] | None = None,
    ) -> None:
        from pipelines.features.run import execute
        from pipelines.features.store import FeatureStore
        from stages.variants import resolve

        system = resolve(variant, tiny, settings)
        store = FeatureStore.open(store_url or work / "store")
        require_used(released or {}, [PASSES[name].encoder], f"the {name} pass")
        chosen = build_pass(name, system, released_folders(work, released) if released is not None else None, poolings)
        if verify:
            for series in chosen.series:
                store.verify(series)
        cluster.connect()
        report = execute(chosen, store, workers=workers, limit_shards=limit_shards)
        if report.rejected and not report.clips:
            raise UserError(f"no clip was usable. {report.sentence()}")
        click.echo(report.sentence())
        if limit_shards is None:
            click.echo(next_step(f"preprocess {name}", speech=system.phonemes is not None))
        else:
            click.echo(f"next: {again(f'loa preprocess {name}')} for the remaining shards")

    options: list[Callable[[Any], Any]] = [work_option, variant_option, tiny_option, set_option]
    if name == "loa":
        options.append(
            click.option(
                "--pooling",
                "poolings",
                callback=_numbers,
                metavar="λ,…",
                help="Poolings λ to store.  [default: those that the variant reads]",
            )
        )
    if PASSES[name].encoder:
        options.append(with_option)
    options += [
        click.option("--store", "store_url", metavar="DIR", help="Feature store, a folder or URL.  [default: store in --work]"),
        click.option(
            "--workers", type=click.IntRange(1), help="Shards computed in parallel.  [default: as many as the cluster has room for]"
        ),
        click.option("--limit-shards", type=click.IntRange(1), help="Stop after this many shards, for a first try.  [default: all]"),
        click.option("--verify", is_flag=True, help="Verify the checksums of existing shards first; corrupt ones are recomputed."),
    ]
    for option in reversed(options):
        command = option(command)
    return click.command(name, help=PASSES[name].help)(command)


@click.group()
def main() -> None:
    """Compute features of the clips: mel first; loa, latent, text and speech once their encoders are trained."""


for _name in PASSES:
    main.add_command(_pass_command(_name))

if __name__ == "__main__":
    main()
