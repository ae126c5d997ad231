"""JOB: public weights in: a diffusers AudioLDM 2 folder, the authors' checkpoint, LAION's CLAP or AudioMAE."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from friendly import friendly
from options import DEFAULT_VARIANT, PlaceType, again, pairs, set_option, shown, work_option
from pipelines.weights import from_hub
from stages.errors import UserError
from stages.files import Place, whole_folder
from stages.public import PARTS, WEIGHTS

AGREE = 1e-4  # embeddings of one CLAP in two packages; measured 1e-7


def import_weights(
    source: str,
    work: str | Path | Place,
    *,
    out: str | Path | Place | None = None,
    variant: str | None = None,
    tiny: bool = False,
    settings: Mapping[str, str] | None = None,
    weights: str = "raw",
    given: Mapping[str, str] | None = None,
    verify: bool = False,
    force: bool = False,
) -> Place:
    """Read public weights in whatever layout `source` has.

    Args:
        source: a folder or hub id in diffusers' layout, or a checkpoint file.
        work: the project folder, where results go if `out` names no other place: `bundle`, `imported/clap`, `imported/audiomae`.
        variant: which system this is; by default the one its T-UNet looks like.
        tiny, settings: sizes of a checkpoint file that are not the variant's own.
        weights: "raw" or "ema", the T-UNet of the authors' checkpoint.
        given: folders (or hub ids) of parts a checkpoint lacks, by name (`PARTS`).
        verify: compare a LAION CLAP with the package laion-clap.
        force: replace what is there.

    Returns:
        The folder written: a bundle, or what `--with clap=` or `--with audiomae=` takes.

    Raises:
        UserError: the source is none of these, does not fit, or something else is in the way.
    """
    from stages.bundle import FILES
    from stages.checkpoints import read_checkpoint, weights_of
    from stages.public import laion
    from stages.public.folder import import_folder
    from stages.public.original import import_original, is_original, require_variant, structure, variants_like
    from stages.public.parts import add_audiomae, is_audiomae, require_parts
    from stages.variants import resolve

    work, out = Place.of(work), None if out is None else Place.of(out)
    bundle = out or work / "bundle"
    path = _here(source, [f"{name}/*" for name in FILES] + ["model_index.json"], source)
    if path.is_dir():
        import_folder(path, bundle, variant, {"imported": {"source": source, "layout": "diffusers"}}, force)
        return bundle
    parts = {name: _part_folder(name, folder) for name, folder in (given or {}).items()}
    state = weights_of(read_checkpoint(path), path)
    if is_original(state):
        unet = structure(state)
        like = variants_like(unet) if unet else []
        chosen = resolve(variant or (like[0] if like else DEFAULT_VARIANT), tiny, settings)
        require_variant(unet, chosen, path)
        provenance = {"imported": {"source": path.name, "layout": "authors", "sha256": _sha256(path)}}
        import_original(state, chosen, bundle, path, parts, weights=weights, provenance=provenance, force=force)
        return bundle
    sizes = resolve(variant or DEFAULT_VARIANT, tiny, settings)
    if laion.is_laion(state):
        require_parts(parts, ("tokenizer",), path)
        if verify:
            _verify(laion.disagreement(state))
        return _import_clap(state, path, _free(out or work / "imported" / "clap", force), parts, sizes.t5.max_length)
    if is_audiomae(state):
        final = _free(out or work / "imported" / "audiomae", force)
        with final.writing_folder(["model.safetensors"]) as folder, whole_folder(folder) as draft:
            add_audiomae(draft, path, sizes.audiomae)
        return final
    raise UserError(
        f"{path} is no known checkpoint: expected the authors' AudioLDM 2 (model.diffusion_model.…), LAION's CLAP (audio_branch.…) "
        f"or AudioMAE (cls_token, blocks.…), got {', '.join(list(state)[:3])} …"
    )


def _import_clap(state: Mapping[str, Any], path: Path, final: Place, parts: Mapping[str, Path], t5_length: int) -> Place:
    """LAION's CLAP, and T5 where `parts` has one, as `--with clap=` takes them."""
    from stages.public import laion
    from stages.public.parts import add_t5, add_tokenizer, require_parts

    config = laion.clap_config(state)
    last = ["feature_extractor/preprocessor_config.json"]  # no CLAP without it
    with final.writing_folder(last) as folder, whole_folder(folder) as draft:
        laion.clap_of(state, path, config).save_pretrained(draft / "text_encoder")
        config.feature_extractor().save_pretrained(draft / "feature_extractor")
        add_tokenizer(draft, "tokenizer", parts["tokenizer"], config.text_vocab)
        if "text_encoder_2" in parts:
            require_parts(parts, ("tokenizer_2",), parts["text_encoder_2"])
            rows = add_t5(draft, parts["text_encoder_2"])
            add_tokenizer(draft, "tokenizer_2", parts["tokenizer_2"], rows, t5_length)
    return final


def _part_folder(name: str, source: str) -> Path:
    if name not in PARTS:
        raise UserError(f"--with {name}={source}: unknown part {name!r}; expected {', '.join(PARTS)}")
    return _here(source, [f"{name}/*", "*.json", "*.txt", "*.model", "*.safetensors"], f"--with {name}={source}")


def _here(source: str, patterns: list[str], said: str) -> Path:
    """What a path, a URL or a hub id names, on this machine; of a hub id files of `patterns` alone."""
    if "://" in source:
        return Place.of(source).local_copy()
    path = Path(source).expanduser()
    return path if path.exists() else from_hub(source, patterns, said)


def _free(out: Place, force: bool) -> Place:
    if out.exists() and not force and (out.list() or out.folders() or not out.local or out.path.is_file()):
        raise UserError(f"{out} exists already; replace it with --force or choose another folder with --out")
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(distance: Mapping[str, float]) -> None:
    distances = f"text {distance['text']:.1e}, audio {distance['audio']:.1e}"
    if max(distance.values()) > AGREE:
        raise UserError(f"the converted CLAP disagrees with laion-clap: {distances}, expected at most {AGREE:g}; it was not written")
    click.echo(f"Same embeddings as laion-clap: greatest distance {distances}")


@click.command("import")
@click.argument("source", metavar="SOURCE")
@work_option
@click.option(
    "--out",
    type=PlaceType(),
    metavar="DIR",
    help="Where to write the result, a folder or URL.  [default: bundle, or imported/STAGE, in --work]",
)
@click.option("--variant", metavar="NAME", help="Which system this is.  [default: the one its T-UNet looks like]")
@click.option("--tiny", is_flag=True, help="With a checkpoint file: use the sizes of the variant's tiny configuration.")
@set_option
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="raw",
    show_default=True,
    help="Which T-UNet of the authors' checkpoint: the trained weights, or their exponential moving average.",
)
@click.option(
    "--with",
    "given",
    multiple=True,
    callback=pairs,
    metavar="PART=FOLDER",
    help=f"Parts that a checkpoint file lacks: {', '.join(PARTS)}. A folder or a hub id; may be repeated.  [default: none]",
)
@click.option("--verify", is_flag=True, help="Compare a LAION CLAP with the package laion-clap (extra: clap).")
@click.option("--force", is_flag=True, help="Replace an existing result.")
@friendly
def main(
    source: str,
    work: Place,
    out: Place | None,
    variant: str | None,
    tiny: bool,
    settings: dict[str, str],
    weights: str,
    given: dict[str, str],
    verify: bool,
    force: bool,
) -> None:
    """Import public weights: SOURCE becomes a bundle, or weights for a stage.

    \b
    SOURCE is one of
      a folder or hub id of a diffusers AudioLDM 2 pipeline       -> a bundle
      the authors' checkpoint, such as audioldm2-full.pth         -> a bundle
      LAION's CLAP, such as music_speech_audioset_….pt            -> weights for --with clap=
      AudioMAE's pretrained.pth                                   -> weights for --with audiomae=

    Files are read without executing any code in them.
    """
    folder = import_weights(
        source, work, out=out, variant=variant, tiny=tiny, settings=settings, weights=weights, given=given, verify=verify, force=force
    )
    where = shlex.quote(shown(folder))
    size = sum(folder.tree().values()) / 1e6
    if (folder / "model_index.json").exists():
        from stages.bundle import read_info

        info = read_info(folder)
        click.echo(f"{where}: {info.variant}, {size:.0f} MB")
        words = ' --transcription "Hello there."' if info.speech else ""
        click.echo(f'next: loa generate "{"a woman speaks calmly" if info.speech else "rain on a tin roof"}"{words} --bundle {where}')
    else:
        stage = "audiomae" if (folder / "model.safetensors").exists() else "clap"
        step = again("loa preprocess " + {"audiomae": "loa", "clap": "text"}[stage])
        click.echo(f"{where}: weights of {stage}, {size:.0f} MB\nnext: {step} --with {stage}={where}")


if __name__ == "__main__":
    main()
