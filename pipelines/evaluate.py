"""JOB: generate for held-out captions, and score the clips beside restored and real ones.

Four sets of the same clips are scored: `generated` (from the caption alone), `vae` (the real clip through VAE and
vocoder), `vocoder` (the real clip's spectrogram through the vocoder), and `real`. Every score is taken from final
waveforms, which lie in `<work>/evaluation` with the record of how they were made. A killed evaluation continues.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from friendly import friendly
from options import PlaceType, next_step, sampling_options, shown, tracking_option, work_option, works_on
from pipelines.evaluation.options import PanelOptions, panel_options

if TYPE_CHECKING:
    from stages.files import Place


@click.command()
@work_option
@click.option("--bundle", type=PlaceType(), metavar="DIR", help="What to evaluate, a folder or URL.  [default: bundle in --work]")
@click.option("--store", metavar="DIR", help="Feature store with the held-out clips.  [default: store in --work]")
@panel_options
@click.option(
    "--captions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Frozen caption list: JSON, or CSV with clip_id and caption.  [default: --num-clips of --split]",
)
@click.option("--num-clips", type=click.IntRange(min=2), default=100, show_default=True, help="Captions, taken in turn from all classes.")
@click.option("--split", metavar="NAME", help="Split of the held-out clips.  [default: test, else validation]")
@click.option("--name", help="What the system is called in records and tables.  [default: the variant]")
@sampling_options("length")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@tracking_option
@friendly
def main(
    work: Place,
    bundle: Place | None,
    store: str | None,
    panel: PanelOptions,
    captions: Path | None,
    num_clips: int,
    split: str | None,
    name: str | None,
    sampling: dict[str, Any],
    seed: int,
    tracking_uri: str | None,
) -> None:
    """Generate for held-out captions of a store, and score the clips beside restored and real ones.

    The same command continues an interrupted evaluation; more clips add to those there are. `loa score` scores a folder of
    clips from another system, `loa compare` puts systems side by side.
    """
    # Here, not above: what takes seconds to import is imported when there is work to do.
    from pipelines.evaluation.clips import Selection
    from pipelines.evaluation.run import evaluate
    from pipelines.tracking import Tracker
    from pipelines.tracking import tracking_uri as find_tracking
    from stages.bundle import local_bundle, read_info
    from stages.files import digest, weights_hash
    from stages.sampling import resolve

    selection = Selection(num_clips, split, captions, seed)
    tracking_uri = find_tracking(work, tracking_uri)  # refused before any work
    bundle = bundle or work / "bundle"
    info = read_info(bundle)
    works_on(info.variant)
    # Each bundle and setting has a run of its own, so that MLflow can compare them.
    run = digest([weights_hash(local_bundle(bundle)), str(selection), str(resolve(**sampling))], 8)
    with Tracker.open(tracking_uri, work=work, job=f"evaluate-{run}", name="evaluate", variant=info.variant) as tracker:
        evaluation = evaluate(work, selection, sampling, panel, bundle=bundle, store=store, name=name, tracker=tracker)
    click.echo(evaluation.table())
    click.echo(f"sounds and scores: {shown(work / 'evaluation')}")
    click.echo(next_step("evaluate"))


if __name__ == "__main__":
    main()
