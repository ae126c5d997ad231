"""What checkpoint files leave out and the user names: tokenizers, T5, AudioMAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, T5EncoderModel

from stages.audiomae.model import AudioMAE, AudioMAEConfig
from stages.checkpoints import read_checkpoint, weights_of
from stages.errors import UserError
from stages.files import Place
from stages.public import PARTS
from stages.quiet import quiet
from stages.tokenizers import misfit

PADDING = {"tokenizer": 1, "tokenizer_2": 0}  # ids of <pad> in RoBERTa's and T5's vocabularies


def beside(out: Path | Place) -> Path:
    """The folder that holds `out` (or what is on its way there), made where it is missing: what is under way lies on the same disk."""
    parent = Place.of(out).scratch().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def require_parts(given: Mapping[str, Path], needed: Iterable[str], source: Path) -> None:
    """Refuse an import that lacks parts the file cannot bring."""
    missing = [name for name in needed if name not in given]
    if missing:
        ways = " ".join(f"--with {name}=FOLDER" for name in missing)
        sources = "; ".join(f"{name}: {PARTS[name]}" for name in missing)
        raise UserError(f"{source} holds no {' and no '.join(missing)}; name {ways} (any AudioLDM 2 pipeline's folder serves; {sources})")


def component(name: str, folder: Path) -> Path:
    """The folder of component `name`: `place` itself, or the one of that name in a pipeline's folder."""
    if not folder.exists():
        raise UserError(f"--with {name}={folder}: that path does not exist; expected {PARTS[name]} or an AudioLDM 2 folder")
    return folder / name if (folder / name).is_dir() else folder


def add_tokenizer(stage: Path, name: str, given: Path, vocabulary: int, length: int | None = None) -> None:
    """Write a given tokenizer into a stage's folder, reading at most `length` tokens.

    Raises UserError when it is none, or not that of a network with this `vocabulary` (`stages.tokenizers.misfit`).
    """
    tokenizer_folder = component(name, given)
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--with {name}={given}: no tokenizer could be read there; expected {PARTS[name]}") from error
    if problem := misfit(tokenizer, vocabulary, PADDING[name]):
        raise UserError(f"--with {name}={given}: {problem}; expected {PARTS[name]}")
    if length is not None:
        tokenizer.model_max_length = length
    tokenizer.save_pretrained(stage / name)


def add_t5(stage: Path, given: Path) -> int:
    """Write the encoder of a given T5 into a stage's folder; return the rows of its embedding table."""
    folder = component("text_encoder_2", given)
    try:
        with quiet():
            encoder: Any = T5EncoderModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            encoder.save_pretrained(stage / "text_encoder_2")
    except (OSError, ValueError) as error:
        raise UserError(f"--with text_encoder_2={given}: no T5 could be read there ({str(error).splitlines()[0][:120]})") from error
    return int(encoder.config.vocab_size)


def add_audiomae(stage: Path, given: Path, config: AudioMAEConfig) -> Path:
    """Write a given AudioMAE (a folder of loa, or `pretrained.pth`) as the stage's folder; return it."""
    network = AudioMAE.load(component("audiomae", given)) if given.is_dir() else read_audiomae(given, config)
    network.save(stage)
    return stage


def is_audiomae(names: Iterable[str]) -> bool:
    """Whether these are the weights of an AudioMAE."""
    return {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(names)


def read_audiomae(path: Path, config: AudioMAEConfig) -> AudioMAE:
    """The AudioMAE of an official checkpoint, with the decoder it happens to have (references.md#audiomae-pretraining)."""
    names = weights_of(read_checkpoint(path), path).keys()
    return AudioMAE.load_pretrained(path, with_decoder_of(config, names))


def with_decoder_of(config: AudioMAEConfig, names: Iterable[str]) -> AudioMAEConfig:
    """`config` with the decoder that weights of these names have: of windows, of plain attention, or none."""
    inner = [name.split(".") for name in names if name.startswith("decoder_blocks.")]
    if not inner:
        return replace(config, decoder="none")
    kind = "swin" if any(name[2:] == ["attn", "tau"] for name in inner) else "global"
    return replace(config, decoder=kind, decoder_depth=len({name[1] for name in inner}))
