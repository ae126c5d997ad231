"""JOB: gather the released stages of a project into one bundle, which `loa generate`, `loa serve` and diffusers load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from friendly import friendly
from options import PlaceType, next_step, shown, tracking_option, with_option, work_option, works_on
from pipelines.tracking import Tracker
from pipelines.tracking import tracking_uri as find_tracking
from pipelines.weights import IN_A_BUNDLE, card_beside, released_folders, require_used
from stages.config import TINY, differences, to_dict
from stages.errors import UserError
from stages.files import Place, code_version, weights_hash, write_json
from stages.licences import inherited, warnings

if TYPE_CHECKING:
    from stages.lora import Adapter
    from stages.variants import Variant

SEPARATE = ("translator", "diffusion")
ALWAYS = ("clap", "audiomae", "vae", "vocoder")


def export(
    work: str | Path | Place,
    variant: Variant | None = None,
    *,
    out: str | Path | Place | None = None,
    given: Mapping[str, str] | None = None,
    joint: bool = True,
    force: bool = False,
    critics: bool = False,
) -> Place:
    """Build the bundle of the project folder `work` and return where it lies.

    Args:
        variant: which system the stages make up; by default what the newest of them says of itself.
        out: where to put it; `<work>/bundle` by default.
        given: folders of weights that replace stages of `work`, by stage name.
        joint: take translator and T-UNet from the joint stage where it has been trained.
        force: replace another bundle at `out`.
        critics: add the discriminators, for further training.

    Raises:
        UserError: a stage is missing, the stages do not belong together, or another bundle is in the way.
    """
    from stages.bundle import assemble

    out = Place.of(out) if out is not None else Place.of(work) / "bundle"
    folders = released_folders(work, given or {})
    if not joint or "joint" not in folders or any(stage in (given or {}) for stage in SEPARATE):
        folders.pop("joint", None)
    used = {s: f for s, f in folders.items() if s in ALWAYS or s == "joint" or ("joint" not in folders and s in SEPARATE)}
    require_used(given or {}, used, "the bundle")
    copies = {stage: folder.local_copy() for stage, folder in used.items()}
    cards = {stage: _card(folder) for stage, folder in copies.items()}
    variant = variant or _variant_of(cards)
    works_on(variant.name)
    _same_audio(cards, variant)
    hashes = {folder: weights_hash(folder) for folder in set(copies.values())}  # imported stages may share one folder
    meta = {
        "variant": variant.name,
        "tiny": variant.name.endswith(TINY),
        "audio": variant.audio,
        "licences": inherited({stage: card_beside(folder) for stage, folder in used.items()}),
        "provenance": {
            "code": code_version(),
            "stages": {
                stage: {k: v for k, v in cards[stage].items() if k != "config"} | {"folder": str(folder), "weights": hashes[copies[stage]]}
                for stage, folder in sorted(used.items())
            },
            "config": to_dict(variant),
        },
    }
    assemble(copies, out, meta, force, critics)
    return out


def export_merged(bundle: str | Path | Place, adapters: Sequence[Adapter], out: str | Path | Place, force: bool = False) -> Place:
    """Build a bundle with LoRA adapters merged into T-UNet and GPT-2, which is as fast as `bundle` and loads wherever that does.

    Raises UserError when there is no such bundle, an adapter does not fit it, or another bundle is in the way.
    """
    from stages.bundle import assemble, load, local_bundle
    from stages.diffusion.model import latent_scale
    from stages.public.parts import beside

    base, out = local_bundle(bundle), Place.of(out)
    parts = load(base, adapters=adapters)
    info, cards = parts.info, [card_beside(Place.of(each.folder)) for each in adapters]
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=beside(out)) as draft:
        joint = Path(draft)
        for name in ("unet", "language_model"):
            getattr(parts, name).save_pretrained(joint / name)
            shutil.copy2(base / name / "config.json", joint / name)  # nothing but the weights has changed
        for name in ("projection_model", "scheduler", *(("text_encoder_2", "tokenizer_2") if info.speech else ())):
            (joint / name).symlink_to((base / name).absolute())
        write_json(joint / "scale.json", {"scale_factor": latent_scale(base)})
        stages = {"clap": base, "vae": base, "vocoder": base, "joint": joint}
        if (base / "audiomae" / "model.safetensors").is_file():
            stages["audiomae"] = base / "audiomae"
        merged = [{"folder": each.folder, "scale": each.scale, "card": card} for each, card in zip(adapters, cards, strict=True)]
        meta = {
            "variant": info.variant,
            "tiny": info.tiny,
            "audio": info.audio,
            "unconditional": info.unconditional,
            "licences": inherited(
                dict.fromkeys(IN_A_BUNDLE, {"licences": info.licences}) | {f"adapters {i}": card for i, card in enumerate(cards, 1)}
            ),
            "provenance": {**info.provenance, "code": code_version(), "merged": merged},
        }
        assemble(stages, out, meta, force)
    return out


def _card(folder: Path) -> dict[str, Any]:
    """What a released stage says of itself; imported weights say nothing."""
    path = folder / "stage.json"
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return card


def _variant_of(cards: Mapping[str, Mapping[str, Any]]) -> Variant:
    from stages.variants import VARIANTS, resolve

    for stage in ("joint", "diffusion", "translator", "vae"):
        card = cards.get(stage, {})
        if (name := str(card.get("variant")).removesuffix(TINY)) in VARIANTS:
            full, tiny = resolve(name), resolve(name, tiny=True)
            return tiny if card["config"]["audiomae"] == to_dict(tiny.audiomae) else full
    raise UserError("the variant is unknown, since all stages are imported weights; name it with --variant")


def _same_audio(cards: Mapping[str, Mapping[str, Any]], variant: Variant) -> None:
    expected = to_dict(variant.audio)
    for stage, card in cards.items():
        if changes := differences(card.get("config", {}).get("audio", expected), expected):
            raise UserError(
                f"the stage {stage} was trained with other audio settings than {variant.name} ({changes}); "
                f"train it again or replace it with --with {stage}=FOLDER"
            )


def _merged(work: Place, adapters: Sequence[str], bundle: Place | None, out: Place | None, force: bool) -> Place:
    """`export_merged` for the options of the command."""
    from stages.lora import Adapter

    given = [Adapter.of(text) for text in adapters]
    base = bundle or next((base for each in given if (base := each.trained_on()) is not None), None)
    if base is None:
        raise UserError(f"{given[0].folder} does not say which bundle it was trained on, or that is gone; name one with --bundle")
    return export_merged(base, given, out or work / "bundle", force)


@click.command()
@work_option
@click.option("--out", type=PlaceType(), metavar="DIR", help="Where to write the bundle, a folder or URL.  [default: bundle in --work]")
@with_option
@click.option(
    "--variant", metavar="NAME", help="Which system this is; needed only when all weights are imported.  [default: as the stages say]"
)
@click.option("--tiny", is_flag=True, help="With --variant: its tiny configuration.")
@click.option("--no-joint", is_flag=True, help="Use translator and diffusion from before joint finetuning.")
@click.option("--critics", is_flag=True, help="Include the discriminators of VAE and vocoder, for further training.")
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    metavar="FOLDER[=SCALE]",
    help="Merge these LoRA adapters into --bundle, instead of gathering stages. May be repeated.  [default: none]",
)
@click.option(
    "--bundle", type=PlaceType(), metavar="DIR", help="With --lora: the bundle to merge into.  [default: the one that they were trained on]"
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@tracking_option
@friendly
def main(
    work: Place,
    out: Place | None,
    released: dict[str, str],
    variant: str | None,
    tiny: bool,
    no_joint: bool,
    critics: bool,
    adapters: tuple[str, ...],
    bundle: Place | None,
    force: bool,
    tracking_uri: str | None,
) -> None:
    """Assemble the trained stages into a bundle that diffusers can load, too; or merge adapters into one, with --lora."""
    from stages.bundle import read_info
    from stages.variants import resolve

    chosen = resolve(variant, tiny) if variant else None
    tracking_uri = find_tracking(work, tracking_uri)  # refused before anything is written
    if adapters:
        if released or chosen or no_joint or critics:
            raise UserError("--lora merges adapters into a whole bundle; leave --with, --variant, --no-joint and --critics out")
        bundle = _merged(work, adapters, bundle, out, force)
    elif bundle is not None:
        raise UserError("--bundle says what --lora is merged into; give --lora, too, or leave it out")
    else:
        bundle = export(work, chosen, out=out, given=released, joint=not no_joint, force=force, critics=critics)
    info = read_info(bundle)
    with Tracker.open(tracking_uri, work=work, job="export", variant=info.variant) as tracker:
        version = tracker.register(bundle, f"loa-{info.variant}")
    size = sum(bundle.tree().values()) / 1e6
    folder = shown(bundle)
    click.echo(f"{folder}: {info.variant}, {size:.0f} MB, version {version} of the model loa-{info.variant} in MLflow")
    for sentence in warnings(info.licences.get("clips", {}), info.licences.get("unstated", ())):
        click.echo(f"Licences: {sentence}.", err=True)
    click.echo(f'listen: loa generate "rain on a tin roof" --bundle {folder}')
    click.echo(next_step("export"))


if __name__ == "__main__":
    main()
