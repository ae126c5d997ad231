"""What leaves training: a folder in the layout of `diffusers.AudioLDM2Pipeline`, with `loa.json` to say what it is.

A bundle reads from safetensors and JSON alone. Public AudioLDM 2 folders (no `loa.json`) are read as bundles, too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from safetensors import SafetensorError
from transformers import (
    ClapFeatureExtractor,
    ClapModel,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    SpeechT5HifiGan,
    T5EncoderModel,
    VitsModel,
)

from stages.audio import AudioConfig
from stages.config import tiny_name
from stages.diffusion.model import latent_scale
from stages.errors import UserError
from stages.files import Place, weights_hash, whole_folder, write_json
from stages.lora import Adapter, merge
from stages.quiet import quiet
from stages.tokenizers import read_tokenizer

BUNDLE_FORMAT = 1
PIPELINE = "AudioLDM2Pipeline"

# Which released stage a component comes from; for speech the translator brings text_encoder_2 and tokenizer_2.
SOURCE = {
    "text_encoder": "clap",
    "tokenizer": "clap",
    "feature_extractor": "clap",
    "text_encoder_2": "clap",
    "tokenizer_2": "clap",
    "projection_model": "translator",
    "language_model": "translator",
    "unet": "diffusion",
    "scheduler": "diffusion",
    "vae": "vae",
    "vocoder": "vocoder",
}
# The files that make a component whole; weights may also be split, with an index beside them.
FILES = {
    "text_encoder": ("config.json", "model.safetensors"),
    "tokenizer": ("tokenizer_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
    "text_encoder_2": ("config.json", "model.safetensors"),
    "tokenizer_2": ("tokenizer_config.json",),
    "projection_model": ("config.json", "diffusion_pytorch_model.safetensors"),
    "language_model": ("config.json", "model.safetensors"),
    "unet": ("config.json", "diffusion_pytorch_model.safetensors"),
    "scheduler": ("scheduler_config.json",),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vocoder": ("config.json", "model.safetensors"),
}
CRITIC = "discriminator.safetensors"
LAST = ("loa.json", "model_index.json")  # a bundle without them is not whole: uploads bring them last


@dataclass(frozen=True)
class BundleInfo:
    """What a bundle says of itself."""

    variant: str
    audio: AudioConfig
    loa_tokens: int  # vectors the language model appends
    unconditional: str  # what guidance steers away from: "zeros" as in our training, or "diffusers"
    speech: bool  # conditioned by a transcription instead of T5 states
    tiny: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, Any] = field(default_factory=dict)  # of what it was trained on (`stages.licences.inherited`)


@dataclass(frozen=True)
class Components:
    """The loaded parts of a bundle, in evaluation mode."""

    info: BundleInfo
    text_encoder: ClapModel
    tokenizer: PreTrainedTokenizerBase
    feature_extractor: ClapFeatureExtractor
    text_encoder_2: T5EncoderModel | VitsModel
    tokenizer_2: PreTrainedTokenizerBase
    projection_model: AudioLDM2ProjectionModel
    language_model: GPT2LMHeadModel
    unet: AudioLDM2UNet2DConditionModel
    scheduler: DDIMScheduler
    vae: AutoencoderKL
    vocoder: SpeechT5HifiGan


# ------------------------------------------------------------------------------------------------------- writing


def assemble(
    stages: Mapping[str, Path], out: Path | Place, meta: Mapping[str, Any], force: bool = False, critics: bool = False
) -> Path | Place:
    """Build the bundle `out` from released stages: whole or not at all.

    Args:
        stages: folders of `clap`, `vae`, `vocoder`, `audiomae` (optional) and `joint`, or `translator` and `diffusion`.
            Folders of a diffusers AudioLDM 2 pipeline serve as well.
        meta: `variant`, `tiny`, `audio` (an AudioConfig or its dict), `provenance`, and optionally `unconditional`, `licences`.
        force: replace another bundle at `out`.
        critics: add the discriminators of VAE and vocoder, for further training.

    Returns:
        `out`. Assembling the same bundle again is no conflict.

    Raises:
        UserError: a stage or a file of it is missing, or `out` holds something else.
    """
    folders = {"translator": stages.get("joint"), "diffusion": stages.get("joint")}
    folders = {name: folder or stages.get(name) for name, folder in folders.items()}
    folders |= {name: stages.get(name) for name in ("clap", "vae", "vocoder")}
    _require_stages(folders)
    where = {name: Path(folders[stage] or "") for name, stage in SOURCE.items()}
    if speech := model_type(where["language_model"] / "text_encoder_2") == "vits":
        where["text_encoder_2"] = where["tokenizer_2"] = where["language_model"]
    _require_files(where)
    before = _existing(Place.of(out))
    with Place.of(out).writing_folder(LAST) as folder, whole_folder(folder) as draft:
        for name, folder in where.items():
            _copy(folder / name, draft / name)
        if "audiomae" in stages:
            for file in ("config.json", "model.safetensors"):
                _copy(Path(stages["audiomae"]) / file, draft / "audiomae" / file)
        for stage in ("vae", "vocoder") if critics else ():
            _copy(Path(stages[stage]) / CRITIC, draft / "discriminators" / f"{stage}.safetensors")
        tokens = _loa_tokens(draft, speech)
        _set_config(draft / "language_model" / "config.json", max_new_tokens=tokens, architectures=["GPT2LMHeadModel"])
        _set_config(draft / "vae" / "config.json", scaling_factor=latent_scale(where["unet"]))
        _require_fit(draft)
        write_json(draft / "model_index.json", _model_index(draft))
        audio = meta["audio"]
        card = {
            "format": BUNDLE_FORMAT,
            "variant": _variant({"tiny": False} | dict(meta)),
            "tiny": bool(meta.get("tiny", False)),
            "audio": audio.to_dict() if isinstance(audio, AudioConfig) else dict(audio),
            "loa_tokens": tokens,
            "unconditional": meta.get("unconditional", "zeros"),
            "weights": weights_hash(draft),
            "licences": dict(meta.get("licences", {})),
            "provenance": dict(meta.get("provenance", {})),
        }
        write_json(draft / "loa.json", card)
        if before is not None and not force and not _same_content(draft, before):
            raise UserError(f"{out} holds another bundle ({_title(before)}); replace it with --force or choose another folder with --out")
    return out


def _existing(out: Place) -> Path | None:
    """The bundle that is at `out`, as a local folder; None where there is nothing, or an upload that was broken off.

    Raises UserError when something else is there.
    """
    if not out.exists():
        return None
    if (out / "model_index.json").exists():
        return out.local_copy()
    if not out.local and {*out.folders(), *out.list()} <= {*FILES, *LAST, "audiomae", "discriminators"}:
        return None
    raise UserError(f"{out} exists and is not a bundle; choose another folder with --out")


def _require_stages(folders: Mapping[str, Path | None]) -> None:
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        commands = ", ".join(f"`loa train {name}`" for name in missing)
        raise UserError(f"a bundle needs the stages {', '.join(missing)}: train them ({commands}) or name folders with --with STAGE=FOLDER")


def _require_files(where: Mapping[str, Path]) -> None:
    missing = [str(folder / name / file) for name, folder in where.items() for file in _missing(folder / name, FILES[name])]
    if missing:
        raise UserError(f"the stages are incomplete; missing: {', '.join(missing)}")


def _require_fit(bundle: Path) -> None:
    """Refuse networks whose shapes do not meet: they come from different variants."""
    config = {name: read_json(bundle / name / "config.json") for name in FILES if (bundle / name / "config.json").is_file()}
    widths = config["unet"]["cross_attention_dim"][0]
    text = config["text_encoder_2"].get("d_model", config["text_encoder_2"].get("hidden_size"))
    pairs = [
        ("the LOA width of the T-UNet", widths[1], "the language model's width", config["language_model"]["n_embd"]),
        ("the T-UNet's latent channels", config["unet"]["in_channels"], "the VAE's", config["vae"]["latent_channels"]),
        (
            "the projection's CLAP width",
            config["projection_model"]["text_encoder_dim"],
            "CLAP's",
            config["text_encoder"]["projection_dim"],
        ),
        ("the projection's text width", config["projection_model"]["text_encoder_1_dim"], "the text encoder's", text),
    ]
    if len(widths) > 2 and widths[2] is not None:
        pairs.append(("the text width of the T-UNet", widths[2], "the text encoder's", text))
    for one, a, other, b in pairs:
        if a != b:
            raise UserError(f"these stages do not fit together: {one} is {a}, {other} is {b}; take all of them from one variant")


def _missing(folder: Path, files: tuple[str, ...]) -> list[str]:
    return [file for file in files if not ((folder / file).is_file() or (folder / f"{file}.index.json").is_file())]


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder; weights in formats that could run code are left behind."""
    if not source.exists():
        raise UserError(f"{source} does not exist; release its stage again or leave it out")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        unsafe = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx")
        shutil.copytree(source, target, ignore=unsafe, copy_function=_link_weights)
    else:
        _link_weights(str(source), str(target))


def _link_weights(source: str, target: str) -> None:
    """Copy a file. Weights, which are only ever replaced as a whole, share their blocks on disk where that is possible."""
    if source.endswith(".safetensors"):
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copy2(source, target)


def _set_config(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def model_type(folder: Path) -> str | None:
    """What a component's configuration calls its network; None where there is no component."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None


def _loa_tokens(bundle: Path, speech: bool) -> int:
    """Length of the LOA: as the language model's configuration says; the published lengths where it is silent."""
    for file in ("config.json", "generation_config.json"):
        path = bundle / "language_model" / file
        said = json.loads(path.read_text(encoding="utf-8")).get("max_new_tokens") if path.is_file() else None
        if said and not (speech and said == 8):  # the public speech folders carry the sound models' 8 (references.md#public-folders)
            return int(said)
    return 512 if speech else 8


def _model_index(bundle: Path) -> dict[str, Any]:
    """What `AudioLDM2Pipeline.from_pretrained` asks for: library and class of every component."""

    def said(name: str, file: str, key: str) -> str:
        return str(json.loads((bundle / name / file).read_text(encoding="utf-8"))[key])

    index: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": diffusers.__version__}
    return index | {
        "feature_extractor": ["transformers", "ClapFeatureExtractor"],
        "language_model": ["transformers", "GPT2LMHeadModel"],  # GPT2Model can no longer generate (references.md#diffusers-pipeline)
        "projection_model": ["audioldm2", "AudioLDM2ProjectionModel"],
        "scheduler": ["diffusers", said("scheduler", "scheduler_config.json", "_class_name")],
        "text_encoder": ["transformers", "ClapModel"],
        "text_encoder_2": ["transformers", "VitsModel" if model_type(bundle / "text_encoder_2") == "vits" else "T5EncoderModel"],
        "tokenizer": ["transformers", said("tokenizer", "tokenizer_config.json", "tokenizer_class")],
        "tokenizer_2": ["transformers", said("tokenizer_2", "tokenizer_config.json", "tokenizer_class")],
        "unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vocoder": ["transformers", "SpeechT5HifiGan"],
    }


def _same_content(a: Path, b: Path) -> bool:
    """Whether two bundles hold the same files; weights are compared by their hash in `loa.json`, provenance is not."""

    def content(path: Path) -> Any:
        if path.suffix == ".safetensors":
            return None
        if path.name == "loa.json":
            card = json.loads(path.read_text(encoding="utf-8"))
            return {k: v for k, v in card.items() if k not in ("licences", "provenance")} | {"variant": _variant(card)}
        return path.read_bytes()

    files = [{p.relative_to(root).as_posix(): content(p) for p in root.rglob("*") if p.is_file()} for root in (a, b)]
    return files[0] == files[1]


def _title(bundle: Path) -> str:
    path = bundle / "loa.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("variant")) if path.is_file() else "a diffusers pipeline"


# ------------------------------------------------------------------------------------------------------- reading


def local_bundle(bundle: str | Path | Place) -> Path:
    """The folder of a bundle: itself where it is local, else this machine's copy of it, fetched anew when it has changed.

    Raises UserError when there is none behind a URL, or one that is not whole.
    """
    place = Place.of(bundle)
    if place.local:
        return place.path
    if not (place / "model_index.json").exists():
        raise UserError(f"there is no whole bundle at {place} (no model_index.json); make one with `loa export` or name another")
    return place.local_copy()


def read_info(bundle: str | Path | Place) -> BundleInfo:
    """What the bundle is, without loading it.

    Raises UserError when the folder is no bundle, lacks parts, or has a format this version does not read.
    """
    bundle = local_bundle(bundle)
    if not bundle.is_dir():
        raise UserError(f"there is no bundle at {bundle}; make one with `loa export` or name another folder with --bundle")
    if not (bundle / "model_index.json").is_file():
        raise UserError(f"{bundle} is not a bundle: it has no model_index.json; `loa export` makes one")
    index = read_json(bundle / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise UserError(f"{bundle} holds a {index.get('_class_name')}, expected an {PIPELINE}")
    card = read_json(bundle / "loa.json") if (bundle / "loa.json").is_file() else None
    if card is not None and card.get("format") != BUNDLE_FORMAT:
        raise UserError(f"{bundle} has bundle format {card.get('format')}, this version of loa reads {BUNDLE_FORMAT}; export it again")
    missing = [f"{name}/{file}" for name, files in FILES.items() for file in _missing(bundle / name, files)]
    if missing:
        raise UserError(f"{bundle} is an incomplete bundle: it lacks {', '.join(missing)}; export it again with `loa export`")
    speech = model_type(bundle / "text_encoder_2") == "vits"
    if card is None:
        return BundleInfo(bundle.resolve().name, audio_of(bundle), _loa_tokens(bundle, speech), "diffusers", speech)
    return BundleInfo(
        variant=_variant(card),
        audio=AudioConfig.from_dict(card["audio"]),
        loa_tokens=card["loa_tokens"],
        unconditional=card["unconditional"],
        speech=speech,
        tiny=card["tiny"],
        provenance=card["provenance"],
        licences=card.get("licences", {}),
    )


def _variant(card: Mapping[str, Any]) -> str:
    """The variant a bundle's card names; cards of earlier versions left "-tiny" to a field of its own."""
    return tiny_name(card["variant"]) if card["tiny"] else str(card["variant"])


def audio_of(bundle: Path) -> AudioConfig:
    """The audio settings of a folder without `loa.json`, from the networks' own configurations."""
    vocoder, vae, unet = (read_json(bundle / name / "config.json") for name in ("vocoder", "vae", "unet"))
    rate, hop = int(vocoder["sampling_rate"]), math.prod(vocoder["upsample_rates"])
    frames = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return AudioConfig(sample_rate=rate, clip_seconds=frames * hop / rate, hop_length=hop, mel_bins=vocoder["model_in_dim"])


def read_json(path: Path) -> dict[str, Any]:
    """A component's configuration. Raises UserError when it is no JSON."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return content


def load(
    bundle: str | Path | Place,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapters: Sequence[Adapter] = (),
) -> Components:
    """Load a bundle onto `device`, from safetensors and JSON only.

    `dtype` is that of the text encoders, the language model and the T-UNet. VAE and vocoder are a small part of the
    work and stay in float32. `adapters` are merged into language model and T-UNet in float32, before these take `dtype`.

    Raises UserError when the bundle is not whole, damaged, or of another format, or a tokenizer or an adapter does not fit its network.
    """
    bundle = local_bundle(bundle)
    info = read_info(bundle)

    def network(cls: Any, name: str, precision: torch.dtype) -> Any:
        argument = "torch_dtype" if issubclass(cls, diffusers.ModelMixin) else "dtype"
        options = {argument: precision, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        try:
            model, report = cls.from_pretrained(bundle / name, **options)
        except (SafetensorError, OSError) as error:  # diffusers turns the first into the second
            raise UserError(f"the weights of {bundle / name} are damaged or cannot be read; export the bundle again") from error
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:3])
            raise UserError(f"the weights of {bundle / name} are incomplete: {len(report['missing_keys'])} are missing ({some}, …)")
        return model.to(device).eval().requires_grad_(False)

    with quiet():
        text_encoder = network(ClapModel, "text_encoder", dtype)
        text_encoder_2 = network(VitsModel if info.speech else T5EncoderModel, "text_encoder_2", dtype)
        kinds = {"language_model": GPT2LMHeadModel, "unet": AudioLDM2UNet2DConditionModel}
        adapted = {name: network(cls, name, torch.float32 if adapters else dtype) for name, cls in kinds.items()}
        merge(adapted, adapters)
        return Components(
            info=info,
            text_encoder=text_encoder,
            tokenizer=read_tokenizer(bundle / "tokenizer", text_encoder.config),
            feature_extractor=ClapFeatureExtractor.from_pretrained(bundle / "feature_extractor", local_files_only=True),
            text_encoder_2=text_encoder_2,
            tokenizer_2=read_tokenizer(bundle / "tokenizer_2", text_encoder_2.config),
            projection_model=network(AudioLDM2ProjectionModel, "projection_model", dtype),
            language_model=adapted["language_model"].to(dtype),
            unet=adapted["unet"].to(dtype),
            scheduler=DDIMScheduler.from_pretrained(bundle / "scheduler", local_files_only=True),
            vae=network(AutoencoderKL, "vae", torch.float32),
            vocoder=network(SpeechT5HifiGan, "vocoder", torch.float32),
        )


def find_bundle(given: str | Path | Place | None) -> Place:
    """The bundle a command means: the one named, $LOA_BUNDLE, or the newest under ./outputs.

    Raises UserError when there is none.
    """
    named = given or os.environ.get("LOA_BUNDLE")
    if named:
        return Place.of(named)
    bundles = [p.parent for pattern in ("bundle", "*/bundle") for p in Path("outputs").glob(f"{pattern}/model_index.json")]
    if not bundles:
        raise UserError(
            "no bundle found under ./outputs; make one with `loa demo` or `loa export`, or name one with --bundle (or $LOA_BUNDLE)"
        )
    return Place.of(max(bundles, key=lambda folder: folder.stat().st_mtime))
