"""The authors' own checkpoints (`audioldm2-full.pth` and its kin) as the components of a bundle (references.md#checkpoint-layout).

One file holds the whole system under nested names. It has no tokenizers: these are given from elsewhere, except the
phoneme table of the speech models, which is loa's own.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.audiomae.model import AudioMAE
from stages.bundle import assemble
from stages.checkpoints import require_fit
from stages.config import TINY
from stages.diffusion.model import noise_schedule
from stages.errors import UserError
from stages.files import Place, write_json
from stages.public import WEIGHTS, layout
from stages.public.layout import Map, Origin
from stages.public.parts import add_audiomae, add_t5, add_tokenizer, beside, require_parts, with_decoder_of
from stages.translator.model import Translator
from stages.variants import VARIANTS, Variant

UNET = "model.diffusion_model."
VAE = "first_stage_model."
VOCODER = "first_stage_model.vocoder."
CONDITIONER = "cond_stage_models.0."
NESTED = "cond_stage_models.0.cond_stage_models."  # CLAP, then T5 or the phoneme encoder, then AudioMAE
# What a file holds beside the networks that are read: second copies, the discriminator of the VAE's training, the schedule's buffers.
_ELSEWHERE = re.compile(
    r"^(model\.diffusion_model|model_ema|clap|cond_stage_models|first_stage_model\.loss)\."
    r"|^(scale_factor|logvar|lvlb_weights|betas|alphas_.*|sqrt_.*|log_one_minus_.*|posterior_.*)$"
)
log = logging.getLogger(__name__)


def is_original(names: Iterable[str]) -> bool:
    """Whether these are the weights of a whole latent-diffusion system."""
    return any(name.startswith((UNET, "model_ema.")) for name in names)


@dataclass(frozen=True)
class Part:
    """One network of the system, and where a file holds it."""

    stage: str
    folder: str  # of the component; "" for AudioMAE, which is its stage's only one
    build: Callable[[], Any]  # with fresh weights
    inner: str  # the module that the file holds: "", the whole network, or an attribute of it
    tensors: dict[str, Tensor]  # that module's, by our names; without values
    places: dict[str, Origin]
    homes: tuple[str, ...]  # the file's names that begin so are this network's and nobody else's

    def held(self, network: Any) -> nn.Module:
        """The module of the built network that the file holds."""
        module: nn.Module = getattr(network, self.inner) if self.inner else network
        return module


def parts(variant: Variant, names: Collection[str] = (), averaged: bool = False, without: Collection[str] = ()) -> list[Part]:
    """The networks of `variant`, and where a file with these `names` holds each; nothing is allocated yet.

    Args:
        names: what the file holds: it decides between the two copies of CLAP and T5, and how deep AudioMAE and the phoneme
            encoder are wrapped. Without names the usual places are meant.
        averaged: take the averaged T-UNet.
        without: components (or stages) that come from elsewhere.
    """
    channels, frames, _ = variant.latent_shape
    text = None if variant.phonemes else variant.t5.width
    tokens = variant.loa_tokens(variant.translator.pooling)

    def unet() -> Any:
        return variant.diffusion.build(channels, frames, variant.audiomae.width, text)

    def translator() -> Translator:
        return Translator(variant.translator, variant.clap.projection_dim, variant.t5.width, tokens, variant.phonemes)

    tables = tuple(CONDITIONER + name for name in ("start_of_sequence_tokens.", "end_of_sequence_tokens.", "input_sequence_embed_linear."))
    clap = _first(names, f"{NESTED}0.model.", "clap.model.")
    places = layout.unet(variant.diffusion.layers_per_block, structure_of(variant)[0])
    vae, levels = tuple(VAE + name for name in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")), len(variant.vae.block_channels)
    listed = [
        _part("clap", "text_encoder", variant.clap.build, layout.clap, clap),
        _part("translator", "language_model", lambda: translator().language_model, layout.gpt2, f"{CONDITIONER}model."),
        _part("translator", "projection_model", lambda: translator().projection_model, layout.projection, CONDITIONER, tables),
        _part("diffusion", "unet", unet, places, UNET),
        _part("vae", "vae", variant.vae.build, layout.vae(levels), VAE, vae),
        _part("vocoder", "vocoder", lambda: variant.vocoder.build(variant.audio), layout.vocoder, VOCODER),
    ]
    if variant.phonemes is not None:
        phonemes = _before(names, f"{NESTED}1.", "emb.weight") or f"{NESTED}1.text_encoder."
        build = variant.phonemes.build
        listed.append(_part("translator", "text_encoder_2", build, layout.phoneme_encoder, phonemes, inner="text_encoder"))
    else:
        t5 = _first(names, f"{NESTED}1.model.", "cond_stage_models.1.model.")
        listed.append(_part("clap", "text_encoder_2", variant.t5.build, layout.same, t5))
    wrapper = _before(names, CONDITIONER, "cls_token") if names else f"{NESTED}2.audiomae.model."
    if wrapper is not None:  # files may have left it out: generating needs none
        inner_names = [name.removeprefix(wrapper) for name in names if name.startswith(wrapper)]
        # Never used, but there: in the authors' files a decoder of plain attention, eight blocks deep (references.md#audiomae-pretraining).
        usual = replace(variant.audiomae, decoder="global", decoder_depth=8)
        config = with_decoder_of(variant.audiomae, inner_names) if names else usual
        listed.append(_part("audiomae", "", lambda: AudioMAE(config), layout.same, wrapper))
    if averaged:
        listed = [_averaged(part) if part.folder == "unet" else part for part in listed]
    return [part for part in listed if part.folder not in without and part.stage not in without]


def _part(stage: str, folder: str, build: Callable[[], Any], where: Map, prefix: str, homes: tuple[str, ...] = (), inner: str = "") -> Part:
    part = Part(stage, folder, build, inner, {}, {}, homes or (prefix,))
    with torch.device("meta"):
        tensors = part.held(build()).state_dict()
    return replace(part, tensors=tensors, places=layout.origins(tensors, where, prefix))


def _averaged(unet: Part) -> Part:
    """The same network, read from the file's running average."""
    places = {name: origin._replace(key=layout.ema(origin.key.removeprefix(UNET))) for name, origin in unet.places.items()}
    return replace(unet, places=places, homes=("model_ema.diffusion",))


def _first(names: Collection[str], *prefixes: str) -> str:
    """The first prefix that occurs; the first of all if none does."""
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), prefixes[0])


def _before(names: Collection[str], start: str, ending: str) -> str | None:
    """What stands before `ending` in the name that begins with `start`: how deep a network lies inside its wrappers."""
    return next((n.removesuffix(ending) for n in names if n.startswith(start) and n.endswith(f".{ending}")), None)


# ---------------------------------------------------------------------------------------------- which system is it?


def structure(names: Iterable[str]) -> tuple[int, int] | None:
    """Transformers per attention place of the T-UNet, and blocks per transformer; None when there are none."""
    inner = [name.removeprefix(f"{UNET}middle_block.").split(".") for name in names if name.startswith(f"{UNET}middle_block.")]
    transformers = {part[0] for part in inner if "transformer_blocks" in part}
    return (len(transformers), len({part[2] for part in inner if "transformer_blocks" in part})) if transformers else None


def structure_of(variant: Variant) -> tuple[int, int]:
    """What `structure` finds in a file of this variant."""
    places = 2 + (variant.phonemes is None) + variant.diffusion.trailing_self_attention
    return places, variant.diffusion.transformer_depth


def variants_like(counts: tuple[int, int]) -> list[str]:
    """Names of the variants whose T-UNet has this structure; the first is the one that reaches furthest."""
    return [name for name, make in VARIANTS.items() if structure_of(make()) == counts]


def require_variant(counts: tuple[int, int] | None, variant: Variant, source: Path | str) -> None:
    """Refuse weights of another system, and say which it looks like."""
    if counts is None or counts == structure_of(variant):
        return
    like = variants_like(counts)
    seen = f"{counts[0]} transformers of {counts[1]} block(s) per attention place"
    if not like:
        raise UserError(f"{source} is neither {variant.name} nor another variant of loa: its T-UNet has {seen}")
    raise UserError(f"{source} matches {' or '.join(like)} ({seen}), not {variant.name}; import it with --variant {like[0]}")


# ----------------------------------------------------------------------------------------------------- reading it


def write_stages(
    state: Mapping[str, Tensor], variant: Variant, out: Path, source: Path, weights: str = "raw", without: Collection[str] = ()
) -> dict[str, Path]:
    """Write the system in a file's weights as folders of released stages below `out`.

    Args:
        state: the file's weights by the authors' names.
        weights: "raw" or "ema".
        without: folders of components that come from elsewhere.

    Returns:
        The folder of every stage found. `clap` lacks its tokenizers.

    Raises:
        UserError: the weights are another variant's, or some are missing, unknown or of another shape.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; expected raw or ema")
    if f"{CONDITIONER}start_of_sequence_tokens.weight" not in state:
        raise UserError(
            f"{source} has no GPT-2 conditioner ({CONDITIONER}start_of_sequence_tokens): it looks like AudioLDM 1, audioldm_48k or "
            "audioldm_16k_crossattn_t5, which loa does not support"
        )
    averaged = weights == "ema"
    if averaged and not any(name.startswith("model_ema.diffusion") for name in state):
        raise UserError(f"{source} holds no averaged T-UNet (model_ema.…); import it with --weights raw")
    require_variant(structure(state), variant, source)
    scale, schedule = scale_factor(state, source), noise_schedule(variant.diffusion.prediction)
    _require_schedule(state, schedule.alphas_cumprod, source)
    wanted = parts(variant, state.keys(), averaged, without)
    shapes = {key: shape for part in wanted for key, shape in layout.expected(part.places).items()}
    may_lack = {key for part in wanted for key in layout.computed(part.places)}
    homes = tuple(home for part in wanted for home in part.homes)
    used = {k: v for k, v in state.items() if k in shapes or (k.startswith(homes) and not layout.UNUSED.search(k))}
    require_fit(shapes, used, source, f"{variant.name} as the authors store it", may_lack)
    if strange := [key for key in state if key not in used and not _ELSEWHERE.search(key) and not layout.UNUSED.search(key)]:
        names = f"{', '.join(strange[:3])}{' …' if len(strange) > 3 else ''}"
        log.warning("%s also holds %d weights of nothing that %s has; they are left out: %s", source, len(strange), variant.name, names)
    for part in wanted:
        network = part.build()  # one at a time: together they are some gigabytes
        held = part.held(network)
        held.load_state_dict(layout.take(held.state_dict(), part.places, state))
        folder = out / part.stage / part.folder
        network.save(folder) if isinstance(network, AudioMAE) else network.save_pretrained(folder)
    variant.clap.feature_extractor().save_pretrained(out / "clap" / "feature_extractor")
    if variant.phonemes is not None:
        variant.phonemes.save_tokenizer(out / "translator" / "tokenizer_2")
    schedule.save_pretrained(out / "diffusion" / "scheduler")
    write_json(out / "diffusion" / "scale.json", {"scale_factor": scale})
    return {stage: out / stage for stage in ("clap", "translator", "diffusion", "vae", "vocoder", "audiomae") if (out / stage).is_dir()}


def scale_factor(state: Mapping[str, Tensor], source: Path) -> float:
    """What latents are multiplied by (references.md#latent-scale): stored in every file, never to be guessed."""
    if "scale_factor" not in state or state["scale_factor"].numel() != 1:
        raise UserError(
            f"{source} holds no scale_factor; without it the latents have the wrong scale; get the file from its original source"
        )
    return float(state["scale_factor"])


def _require_schedule(state: Mapping[str, Tensor], expected: Tensor, source: Path) -> None:
    """The file's noise schedule, where it holds one, is the one that generation will use."""
    held = state.get("alphas_cumprod")
    if held is None:
        return
    if held.shape != expected.shape or not torch.allclose(held.float(), expected, atol=1e-4):
        raise UserError(
            f"{source} was trained with another noise schedule: ᾱ of {tuple(held.shape)} ending at {float(held[-1]):.3g}, "
            f"expected {tuple(expected.shape)} ending at {float(expected[-1]):.3g} (β from 0.0015 to 0.0195, scaled linear)"
        )


def import_original(
    state: Mapping[str, Tensor],
    variant: Variant,
    out: Path | Place,
    source: Path,
    given: Mapping[str, Path],
    *,
    weights: str = "raw",
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path | Place:
    """Make the bundle `out` from the authors' weights, whole or not at all.

    Args:
        given: folders of what the file lacks, by component: `tokenizer` (RoBERTa's), `tokenizer_2` (T5's; speech has its own
            phoneme table), and, where they are to come from elsewhere, `text_encoder_2` and `audiomae`.
        weights: "raw", as the authors generate, or "ema".
        force: replace another bundle at `out`.

    Raises:
        UserError: see `write_stages`; or a tokenizer is missing or of another vocabulary.
    """
    speech = variant.phonemes is not None
    require_parts(given, ("tokenizer",) if speech else ("tokenizer", "tokenizer_2"), source)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=beside(out)) as draft:
        clap = Path(draft) / "clap"
        add_tokenizer(clap, "tokenizer", given["tokenizer"], variant.clap.text_vocab)
        if not speech:
            rows = add_t5(clap, given["text_encoder_2"]) if "text_encoder_2" in given else variant.t5.vocab
            add_tokenizer(clap, "tokenizer_2", given["tokenizer_2"], rows, variant.t5.max_length)
        stages = write_stages(state, variant, Path(draft), source, weights, without=given.keys())
        if "audiomae" in given:
            stages["audiomae"] = add_audiomae(Path(draft) / "audiomae", given["audiomae"], variant.audiomae)
        meta = {
            "variant": variant.name,
            "tiny": variant.name.endswith(TINY),
            "audio": variant.audio,
            "unconditional": "zeros",  # as the authors train and generate (references.md#guidance)
            "provenance": {**(provenance or {}), "weights": weights},
        }
        return assemble(stages, out, meta, force)
