"""Every system by name. A variant is a value, built by a function, derived from its nearest relative.

Table I of the paper (AudioLDM 2, arXiv 2308.05734) has seven; `tiny` shrinks any of them for laptops and tests.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stages.audio import AudioConfig
from stages.audiomae.model import AudioMAEConfig
from stages.clap.model import ClapConfig, T5Config
from stages.classifier.model import ClassifierConfig
from stages.config import TINY, Recipe, override, tiny_name
from stages.diffusion.model import DiffusionConfig
from stages.errors import UserError
from stages.joint.model import JointConfig
from stages.translator.model import PhonemeEncoderConfig, TranslatorConfig
from stages.vae.model import VAEConfig, VAELossConfig
from stages.vocoder.model import VocoderConfig, VocoderLossConfig

PATCH = 16  # AudioMAE's patches are 16 frames by 16 bins


@dataclass(frozen=True)
class Recipes:
    """How each stage is optimised. Where paper and code differ the code's value stands (references.md#optimisers)."""

    clap: Recipe = Recipe(100_000, 2048, 1e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=3200, decay="cosine")
    audiomae: Recipe = Recipe(130_000, 512, 4e-4, betas=(0.9, 0.95), weight_decay=1e-4, warmup_steps=12_000, decay="cosine", clip_norm=None)
    vae: Recipe = Recipe(800_000, 32, 8e-6, betas=(0.5, 0.9), weight_decay=0.0, clip_norm=None)
    vocoder: Recipe = Recipe(1_000_000, 96, 2e-4, betas=(0.8, 0.99), weight_decay=0.01, decay="exponential", clip_norm=None)
    translator: Recipe = Recipe(300_000, 128, 1e-4, warmup_steps=10_000, clip_norm=None)
    diffusion: Recipe = Recipe(800_000, 128, 1e-4, warmup_steps=10_000, clip_norm=None, ema_decay=0.9999)
    joint: Recipe = Recipe(200_000, 128, 1e-4, warmup_steps=10_000, clip_norm=None, ema_decay=0.9999)
    classifier: Recipe = Recipe(20_000, 64, 1e-3, warmup_steps=500, decay="cosine")


@dataclass(frozen=True)
class Phase:
    """A part of a stage's training. It begins with the weights of the part before, and with an optimiser of its own."""

    corpora: tuple[str, ...]
    recipe: Recipe | None = None  # None = the variant's for that stage


@dataclass(frozen=True)
class Variant:
    """A whole system: its audio settings, its networks, how they are trained, and on which corpora."""

    name: str
    summary: str
    corpora: tuple[str, ...]
    audio: AudioConfig = AudioConfig()
    clap: ClapConfig = ClapConfig()
    t5: T5Config = T5Config()
    phonemes: PhonemeEncoderConfig | None = None  # speech: phonemes take T5's place, and the T-UNet reads no text
    audiomae: AudioMAEConfig = AudioMAEConfig()
    vae: VAEConfig = VAEConfig()
    vae_loss: VAELossConfig = VAELossConfig()
    vocoder: VocoderConfig = VocoderConfig()
    vocoder_loss: VocoderLossConfig = VocoderLossConfig()
    translator: TranslatorConfig = TranslatorConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    joint: JointConfig = JointConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    recipes: Recipes = field(default_factory=Recipes)
    phases: Mapping[str, tuple[Phase, ...]] = field(default_factory=dict)  # of stages that do not learn from all corpora at once

    def phases_of(self, stage: str) -> list[tuple[tuple[str, ...], Recipe]]:
        """Corpora and recipe of one part of a stage's training after the other; most have one part."""
        return [(part.corpora, part.recipe or getattr(self.recipes, stage)) for part in self.phases.get(stage, (Phase(self.corpora),))]

    @property
    def loa_grid(self) -> tuple[int, int]:
        """AudioMAE's token grid (time, frequency) of one clip."""
        return self.audio.mel_frames // PATCH, self.audio.fbank_bins // PATCH

    @property
    def poolings(self) -> tuple[int, ...]:
        """Every λ that one of its stages reads, ascending."""
        return tuple(sorted({*self.diffusion.poolings, self.translator.pooling}))

    def loa_tokens(self, pooling: int) -> int:
        """Vectors of the LOA at pooling λ: at most all frequencies are merged (references.md#loa-pooling)."""
        frames, bins = self.loa_grid
        return (frames // pooling) * (bins // min(pooling, bins))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, frames and bins of one clip's latent."""
        return self.vae.latent_shape(self.audio.mel_frames, self.audio.mel_bins)

    @property
    def text_length(self) -> int:
        """Places of the text condition: T5 tokens, or phonemes for speech."""
        return self.phonemes.max_length if self.phonemes else self.t5.max_length


# What keeps small corpora from being learnt by heart: upper bounds in epochs, the best of a measure, an end when it stays away
# (docs/variants.md#how-long-each-is-trained). The measure of diffusion and joint is the paper's for AudioCaps (V-A), every five epochs.


def bounded(recipes: Recipes, **changes: Mapping[str, Any]) -> Recipes:
    """`recipes` with changes by stage."""
    return replace(recipes, **{stage: replace(getattr(recipes, stage), **change) for stage, change in changes.items()})


def audiocaps_recipes() -> Recipes:
    """45,000 clips: an epoch is 352 steps of 128."""
    return bounded(
        Recipes(),
        clap={"epochs": 100, "validate_every": 110, "patience": 10},
        audiomae={"epochs": 400},
        translator={"epochs": 60, "validate_every": 352, "patience": 10},
        diffusion={"epochs": 200, "listen_epochs": 5, "patience": 5},
        joint={"epochs": 50, "listen_epochs": 5, "patience": 3},
    )


def music_recipes() -> Recipes:
    """510,000 tracks: an epoch is at least 3,984 steps of 128."""
    return bounded(
        Recipes(),
        clap={"epochs": 100},
        translator={"epochs": 40, "patience": 20},
        diffusion={"epochs": 100, "listen_epochs": 2, "patience": 10},
        joint={"epochs": 20, "listen_epochs": 1, "patience": 5},
    )


def full_recipes() -> Recipes:
    """10.4 million clips: an epoch is 81,000 steps of 128, and nothing is seen ten times."""
    return bounded(Recipes(), diffusion={"listen_epochs": 0.25}, joint={"listen_epochs": 0.25})


def speech_recipes() -> Recipes:
    """13,100 utterances: an epoch is 102 steps of 128."""
    return bounded(
        Recipes(),
        clap={"epochs": 100, "validate_every": 60, "patience": 10},
        audiomae={"epochs": 400},
        translator={"epochs": 300, "validate_every": 510, "patience": 10},
        diffusion={"epochs": 600, "listen_epochs": 15, "patience": 5},
        joint={"epochs": 100, "listen_epochs": 5, "patience": 3},
    )


def audioldm2_full() -> Variant:
    """The reference: all corpora, sound effects and music. Table I counts the first five; the text names FMA, which ingest reads only
    when asked for."""
    corpora = ("audiocaps", "audioset", "wavcaps", "vggsound", "msd", "fma")
    return Variant("audioldm2-full", "text to sound and music, all corpora", corpora, recipes=full_recipes())


def audioldm2_ac() -> Variant:
    """Full, trained on AudioCaps alone."""
    return replace(
        audioldm2_full(), name="audioldm2-ac", summary="text to sound, AudioCaps alone", corpora=("audiocaps",), recipes=audiocaps_recipes()
    )


def audioldm2_msd() -> Variant:
    """Full, trained on the Million Song Dataset alone."""
    return replace(
        audioldm2_full(), name="audioldm2-msd", summary="text to music, Million Song Dataset", corpora=("msd",), recipes=music_recipes()
    )


def audioldm2_full_large() -> Variant:
    """Full, with the deeper T-UNet."""
    full = audioldm2_full()
    deeper = replace(full.diffusion, transformer_depth=2, trailing_self_attention=True)
    return replace(full, name="audioldm2-full-large", summary="full, with the deeper T-UNet", diffusion=deeper)


def audioldm2_ac_large() -> Variant:
    """Full-large, trained on AudioCaps alone."""
    large = audioldm2_full_large()
    summary = "AudioCaps alone, with the deeper T-UNet"
    return replace(large, name="audioldm2-ac-large", summary=summary, corpora=("audiocaps",), recipes=audiocaps_recipes())


def audioldm2_ljs() -> Variant:
    """Speech: phonemes and the speaker's CLAP embedding → 512 LOA vectors; no text in the T-UNet."""
    full = audioldm2_full()
    return replace(
        full,
        name="audioldm2-ljs",
        summary="text to speech, one speaker",
        corpora=("ljspeech",),
        phonemes=PhonemeEncoderConfig(),
        translator=replace(full.translator, pooling=1),
        diffusion=replace(full.diffusion, poolings=(1,)),
        joint=replace(full.joint, ground_truth=1.0),
        recipes=speech_recipes(),
    )


def audioldm2_ljs_pretrained() -> Variant:
    """Speech, with GigaSpeech to learn from before LJSpeech: the translator reads it first, the T-UNet both, joint training LJSpeech."""
    ljs = audioldm2_ljs()
    speech = speech_recipes()
    return replace(
        ljs,
        name="audioldm2-ljs-pretrained",
        summary="text to speech, GigaSpeech then LJSpeech",
        corpora=("gigaspeech", "ljspeech"),
        recipes=replace(full_recipes(), translator=speech.translator, joint=speech.joint),
        phases={
            "translator": (Phase(("gigaspeech",), Recipes().translator), Phase(("ljspeech",))),
            "joint": (Phase(("ljspeech",)),),
        },
    )


VARIANTS: dict[str, Callable[[], Variant]] = {
    make().name: make
    for make in (
        audioldm2_full,
        audioldm2_ac,
        audioldm2_msd,
        audioldm2_full_large,
        audioldm2_ac_large,
        audioldm2_ljs,
        audioldm2_ljs_pretrained,
    )
}


def tiny(variant: Variant) -> Variant:
    """The same system with every width, depth and length shrunk: two cores train it in minutes.

    Clips of 2.56 s (speech 5.12 s) at 16 kHz; AudioMAE's grid is 16 x 8, so λ = 4 leaves the 8 LOA vectors of the full system.
    Lengths and budgets were chosen by measurement (docs/log.md).
    """
    speech = variant.phonemes is not None
    seconds = 5.12 if speech else 2.56  # an utterance must fit in a clip whole
    return replace(
        variant,
        name=tiny_name(variant.name),
        audio=replace(variant.audio, clip_seconds=seconds),
        clap=ClapConfig(
            projection_dim=128,
            text_vocab=1000,
            text_width=128,
            text_layers=2,
            text_heads=4,
            audio_width=24,
            audio_depths=(1, 1, 2),
            audio_heads=(2, 4, 8),
            window_size=4,
            spec_size=64,
            sample_rate=16_000,
            max_seconds=math.ceil(seconds),
            hop_length=800 if speech else 400,
            mel_bins=32,
            fmax=8000.0,
            text_length=40,
        ),
        t5=T5Config(vocab=1000, width=128, head_width=32, heads=4, layers=2, feed_forward=256, max_length=40),
        phonemes=PhonemeEncoderConfig(width=96, layers=3, feed_forward=192, max_length=96) if speech else None,
        audiomae=AudioMAEConfig(
            width=128,
            depth=6,
            heads=4,
            frames=round(100 * seconds),
            decoder="global",
            decoder_width=96,
            decoder_depth=2,
            decoder_heads=4,
        ),
        vae=VAEConfig.tiny(),
        vae_loss=VAELossConfig.tiny(),
        vocoder=VocoderConfig.tiny(),
        vocoder_loss=VocoderLossConfig.tiny(),
        translator=replace(
            variant.translator,
            width=128,
            layers=4,
            heads=4,
            positions=512,
            vocab=8,
            dropout=0.0,
            clap_dropout=0.0,
            pooling=1 if speech else 4,
        ),
        # v-prediction: ε at the noisiest steps says almost nothing about z, which a short training does not forgive.
        diffusion=replace(
            variant.diffusion, channels=(96, 128), layers_per_block=1, heads=(3, 4), norm_groups=16, prediction="v_prediction"
        ),
        recipes=tiny_recipes(speech, len(variant.phases_of("translator"))),
        phases={stage: tuple(replace(part, recipe=None) for part in parts) for stage, parts in variant.phases.items()},
    )


def tiny_recipes(speech: bool = False, phases: int = 1) -> Recipes:
    """Budgets for two CPU cores: all stages in a quarter of an hour by the clock, fewer where the steps end first (docs/log.md).

    `phases` of the translator share its time.
    """
    short = Recipe(
        300, 32, 1e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=30, decay="cosine", validate_every=150, checkpoint_every=100
    )
    often = replace(short, global_batch=4, learning_rate=2e-3, weight_decay=0.0, validate_every=600, checkpoint_every=200)
    return Recipes(
        clap=replace(short, steps=500, max_seconds=55),
        audiomae=replace(short, steps=500, max_seconds=38),
        # Half the clips, twice the steps: in so few of them the number of steps counts.
        vae=replace(often, steps=2000, max_seconds=160 if speech else 200),
        vocoder=replace(often, steps=3000, betas=(0.8, 0.99), max_seconds=190),
        translator=replace(short, steps=600, max_seconds=180 / phases if speech else 30),  # 256 vectors to write, not 8
        diffusion=replace(short, steps=1000, global_batch=16, ema_decay=0.999, validate_every=500, max_seconds=165),
        # GPT-2 writes 256 vectors for speech, all held for the way back: 8.5 GB for 16 clips at once.
        joint=replace(
            short, steps=400, global_batch=16, learning_rate=4e-4, ema_decay=0.99, max_seconds=55, micro_batch=4 if speech else None
        ),
        classifier=replace(short, steps=150),  # it judges the others: as good on every machine, however busy that is
    )


def resolve(name: str, tiny: bool = False, settings: Mapping[str, str] | None = None) -> Variant:
    """The variant called `name`, shrunk if `tiny` or if the name ends in "-tiny", with dotted `settings` put in (strict).

    Raises UserError for an unknown name or setting, with the nearest real ones.
    """
    full = name.removesuffix(TINY)
    if full not in VARIANTS:
        near = difflib.get_close_matches(full, VARIANTS, 3, 0.4) or list(VARIANTS)
        raise UserError(f"unknown variant {name!r}; nearest: {', '.join(near)} (`loa variants` lists all)")
    variant = VARIANTS[full]()
    if tiny or name != full:
        variant = _shrink(variant)
    resolved: Variant = override(variant, _for_all_phases(variant, settings or {}))
    return resolved


def _for_all_phases(variant: Variant, settings: Mapping[str, str]) -> dict[str, str]:
    """A setting of a stage's recipe holds for its phases, too, unless one is set by itself."""
    own = {}
    for path, text in settings.items():
        group, stage, name = [*path.split(".", 2), "", ""][:3]
        for i, part in enumerate(variant.phases.get(stage, ()) if group == "recipes" else ()):
            if part.recipe is not None:
                own[f"phases.{stage}.{i}.recipe.{name}"] = text
    return own | dict(settings)


_shrink = tiny  # `resolve` has a flag of the same name
