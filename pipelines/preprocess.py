"""JOB: the passes that fill the feature store, `loa preprocess mel | loa | latent | text | speech`.

Each pass makes the shards that the store lacks, so it can be stopped and started again, on another number of workers
too. The encoders are the stages trained in the work folder, or whatever `--with` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from friendly import friendly
from options import (
    AS_NEEDED,
    again,
    in_this_process,
    next_step,
    set_option,
    tiny_option,
    tracking_option,
    variant_option,
    with_option,
    work_option,
    worker_options,
)
from pipelines import cluster
from pipelines.weights import released_folders, require_used
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.features.passes import Pass
    from pipelines.features.run import PassReport
    from pipelines.features.store import FeatureStore
    from pipelines.tracking import Tracker
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
    skip_silence: float | None = None,
    **settings: Any,
) -> PassReport:
    """Make the missing shards of one pass on the joined Ray cluster, or on one started here.

    Args:
        name: mel, loa, latent, text or speech.
        store: the feature store, or where it lies.
        released: folders of weights by stage; every pass but mel needs one.
        work: the project folder whose trained stages serve where `released` names none.
        poolings: λ of the loa pass; by default what the variant's stages read.
        skip_silence: of the mel pass (`MelPass`); by default nothing that holds sound is left out.
        settings: of `make_missing`.
    """
    from pipelines.features.store import FeatureStore

    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    folders = (released_folders(work, {}) if work else {}) | dict(released or {})
    return make_missing(build_pass(name, variant, folders, poolings, skip_silence), opened, **settings)


def make_missing(
    chosen: Pass,
    store: FeatureStore,
    *,
    precision: str | None = None,
    reject_failed: bool = False,
    tracker: Callable[[], Tracker] | None = None,
    **settings: Any,
) -> PassReport:
    """Make the shards of a pass that the store lacks, and log what came of it.

    Args:
        precision: of the encoder, for a new series; by default what suits the device, and what a series began with.
        reject_failed: reject clips that fail, which are otherwise tried again.
        tracker: opens the run that is told of progress and result; by default none.
        settings: of `pipelines.features.run.execute`: workers, reserve, limit_shards, shards, retry_rejected, progress, ...

    Raises:
        UserError: shards are left that could not be made, or what `execute` refuses.
    """
    from pipelines.features.run import choose_precision, execute
    from pipelines.features.summary import log_pass
    from pipelines.tracking import Tracker

    if not in_this_process(settings.get("workers")):
        cluster.connect()
    chosen.reject_failed = reject_failed
    choose_precision(chosen, store, precision, settings.get("workers"), settings.get("reserve", AS_NEEDED))
    report = execute(chosen, store, tracker=tracker or Tracker.off, **settings)
    if tracker is not None and (report.made or report.failing):
        log_pass(tracker(), report, store)
    report.require_whole()
    return report


def build_pass(
    name: str,
    variant: Variant,
    released: Mapping[str, Path | Place] | None = None,
    poolings: Sequence[int] | None = None,
    skip_silence: float | None = None,
) -> Pass:
    """The pass called `name` with the variant's settings and the encoder among `released`.

    Raises UserError when its encoder is not there.
    """
    from pipelines.features.passes import LatentPass, LoaPass, MelPass, SpeechPass, TextPass
    from stages.translator.model import PhonemeEncoderConfig

    kinds: dict[str, type[Pass]] = {kind.name: kind for kind in (MelPass, LoaPass, LatentPass, TextPass, SpeechPass)}
    kind = kinds[name]
    if kind is MelPass:
        return MelPass(variant.audio, skip_silence)
    if not released or kind.encoder not in released:
        raise UserError(
            f"the {name} pass needs the weights of {kind.encoder}; train them with `loa train {kind.encoder}`, "
            f"or give them with `--with {kind.encoder}=FOLDER_OR_HUB_ID`"
        )
    folder = Place.of(released[kind.encoder])  # workers run in folders of their own
    if kind is LoaPass:
        wanted = poolings or variant.poolings
        for pooling in wanted:
            _check_pooling(variant, pooling)
        return LoaPass(variant.audio, folder, wanted)
    if kind is SpeechPass:
        return SpeechPass(variant.audio, folder, (variant.phonemes or PhonemeEncoderConfig()).max_length)
    return kind(variant.audio, folder)


def dry_run_of(name: str, store: FeatureStore, variant: Variant, work: Place, poolings: Sequence[int] | None = None) -> list[str]:
    """What a pass would do to a store, in lines, with the time that measured rates promise; it needs no weights."""
    from pipelines.features.rates import rates_here
    from pipelines.features.spend import series_bytes, still_to_do

    chosen = build_pass(name, variant, {PASSES[name].encoder: work}, poolings)  # its folder is never opened
    sizes = series_bytes(variant, getattr(chosen, "poolings", ()))
    return still_to_do(chosen, store, sizes, rates_here(work, variant.name))


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


def _shard_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """ "0-99,120" as numbers."""
    if value is None:
        return None
    numbers: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        try:
            numbers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise click.BadParameter(f"{value!r} does not name shards; expected numbers and ranges such as 0-99,120") from None
    return numbers


def _pass_command(name: str) -> click.Command:
    """The command of one pass; they share all options but --pooling, --with and --precision."""

    @friendly
    def command(
        work: Place,
        variant: str,
        tiny: bool,
        settings: dict[str, str],
        store_url: str | None,
        limit_shards: int | None,
        verify: bool,
        dry_run: bool,
        tracking_uri: str | None,
        released: dict[str, str] | None = None,
        poolings: tuple[int, ...] | None = None,
        skip_silence: float | None = None,
        precision: str | None = None,
        **options: Any,
    ) -> None:
        from pipelines.features.store import FeatureStore
        from pipelines.tracking import opened_when_needed
        from stages.variants import resolve

        system = resolve(variant, tiny, settings)
        store = FeatureStore.open(store_url or work / "store")
        require_used(released or {}, [PASSES[name].encoder], f"the {name} pass")
        if dry_run:
            click.echo("\n".join(dry_run_of(name, store, system, work, poolings)))
            return
        folders = released_folders(work, released) if released is not None else None
        chosen = build_pass(name, system, folders, poolings, skip_silence)
        if verify:
            for series in chosen.series:
                store.verify(series)
        with opened_when_needed(tracking_uri, work=work, job=f"preprocess-{name}", variant=system.name) as tracker:
            report = make_missing(chosen, store, precision=precision, limit_shards=limit_shards, tracker=tracker, **options)
        if report.rejected and not report.clips:
            raise UserError(f"no clip was usable. {report.sentence()}")
        click.echo(report.sentence())
        if limit_shards is None and options["shards"] is None:
            click.echo(next_step(f"preprocess {name}", speech=system.phonemes is not None))
        else:
            click.echo(f"next: {again(f'loa preprocess {name}')} for the remaining shards")

    for option in reversed(_options(name)):
        command = option(command)
    return click.command(name, help=PASSES[name].help)(command)


def _options(name: str) -> list[Callable[[Any], Any]]:
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
    if name == "mel":
        options.append(
            click.option(
                "--skip-silence",
                type=click.FloatRange(max=0.0),
                metavar="DB",
                help="Leave out clips whose loudest 20 ms lie below DB of full scale, such as -50; settled when the series begins.  "
                "[default: only what holds no sound at all]",
            )
        )
    if PASSES[name].encoder:
        options += [
            with_option,
            click.option(
                "--precision",
                type=click.Choice(("fp32", "bf16", "fp16")),
                help="Precision of the encoder; that of a series is settled when it begins.  [default: by the device: fp32 on CPUs]",
            ),
        ]
    return [
        *options,
        click.option("--store", "store_url", metavar="DIR", help="Feature store, a folder or URL.  [default: store in --work]"),
        worker_options,
        click.option("--shards", callback=_shard_numbers, metavar="N-M,…", help="Only these shards, such as 0-99,120.  [default: all]"),
        click.option("--limit-shards", type=click.IntRange(1), help="Stop after this many shards, for a first try.  [default: all]"),
        click.option("--dry-run", is_flag=True, help="Say what would be done: shards, clips, hours, bytes, time; do nothing."),
        click.option("--verify", is_flag=True, help="Verify the checksums of existing shards first; corrupt ones are recomputed."),
        click.option(
            "--retry-rejected",
            is_flag=False,
            flag_value="",
            metavar="[PART]",
            help="Make shards again that rejected clips, or only those with PART in a reason.  [default: rejected is rejected]",
        ),
        click.option("--reject-failed", is_flag=True, help="Reject clips that cannot be read, which otherwise hold up their shards."),
        tracking_option,
    ]


@click.group()
def main() -> None:
    """Compute features of the clips: mel first; loa, latent, text and speech once their encoders are trained."""


for _name in PASSES:
    main.add_command(_pass_command(_name))

if __name__ == "__main__":
    main()
