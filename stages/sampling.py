"""How sound is sampled: every choice by name, and the profiles that repeat a reference's choices."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

from stages.errors import UserError

SCHEDULERS = ("dpm-solver++", "ddim", "unipc", "pndm", "euler")
CHOICES = {
    "scheduler": SCHEDULERS,
    "timesteps": ("loa", "diffusers", "authors"),
    "unconditional": ("zeros", "diffusers"),
    "padding": ("prompt", "batch"),
    "length": ("loa", "diffusers", "authors"),
}


@dataclass(frozen=True)
class Sampling:
    """Everything that decides a sound beside prompt, seed and seconds. The defaults are loa's own.

    Those of the authors and of diffusers: references.md#sampling, references.md#guidance.

    Attributes:
        scheduler: one of `SCHEDULERS`.
        num_inference_steps: denoising steps.
        guidance_scale: weight of the condition against no condition; 1 means no guidance.
        eta: DDIM's share of fresh noise in [0, 1]; other schedulers have none.
        timesteps: spacing of the sampling steps over the 1000 training steps. "loa" spreads the steps over all of them. "diffusers" goes
            in whole strides of 1000 // steps and leaves what is over at the noisy end unused. "authors" (ddim only) goes
            in the same strides to the end, and so takes more steps than asked for. With ddim and pndm all three
            are one where the steps divide 1000.
        unconditional: the unconditional input of guidance. "zeros" is what condition dropout showed the T-UNet: no LOA, the
            empty text. "diffusers" is GPT-2's LOA of the empty prompt. None: what the bundle was made for.
        padding: "prompt" reads every prompt at its own length, so that neighbours in a batch do not matter. "batch" pads
            all to the longest of the batch, as both references do; GPT-2 counts the padding (references.md#condition-sequence).
        length: latent frames and samples for the seconds asked for. "loa": as many frames as cover them, cut to the
            sample. "diffusers": whole mel frames, then the same. "authors": 1.024 times the seconds, uncut.
        candidates: generate at least this many per prompt and return those with the best CLAP score, best first;
            1 means no ranking.
    """

    scheduler: str = "dpm-solver++"
    num_inference_steps: int = 50
    guidance_scale: float = 3.5
    eta: float = 0.0
    timesteps: str = "loa"
    unconditional: str | None = None
    padding: str = "prompt"
    length: str = "loa"
    candidates: int = 1

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "unconditional" and value is None):
                raise UserError(f"{name} is {value!r}; {_nearest(value, allowed)}expected one of {', '.join(allowed)}")
        for name in ("num_inference_steps", "candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}; expected an integer of at least 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 1 (no guidance) or more")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}; expected a number from 0 to 1")
        if self.eta and self.scheduler != "ddim":
            raise UserError(f"eta is {self.eta}, but only the scheduler 'ddim' uses it, not {self.scheduler!r}; set eta to 0")
        if self.timesteps == "authors" and self.scheduler != "ddim":
            raise UserError(f"the authors' timesteps belong to the scheduler 'ddim', not to {self.scheduler!r}; set timesteps to 'loa'")


OPTIONS = tuple(field.name for field in dataclasses.fields(Sampling))

PROFILES: dict[str, Sampling] = {
    "loa": Sampling(),
    # AudioLDM2Pipeline of diffusers as it stands (fidelity.md, rows 7, 10, 17, 24).
    "diffusers": Sampling(
        scheduler="ddim", num_inference_steps=200, timesteps="diffusers", unconditional="diffusers", padding="batch", length="diffusers"
    ),
    # The authors' own inference: full noise, no LOA without a prompt, 256 latent frames uncut, the best of three.
    "authors": Sampling(
        scheduler="ddim",
        num_inference_steps=200,
        eta=1.0,
        timesteps="authors",
        unconditional="zeros",
        padding="batch",
        length="authors",
        candidates=3,
    ),
}


def resolve(profile: str = "loa", **options: Any) -> Sampling:
    """The profile called `profile` with `options` (fields of `Sampling`) in place of its own; None leaves the profile's.

    Raises UserError for an unknown profile or option, and for values that are out of range or do not fit each other.
    """
    if profile not in PROFILES:
        raise UserError(f"unknown profile {profile!r}; {_nearest(profile, PROFILES)}expected one of: {', '.join(PROFILES)}")
    for name in options:
        if name not in OPTIONS:
            raise UserError(f"unknown sampling option {name!r}; {_nearest(name, OPTIONS)}expected one of: {', '.join(OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(PROFILES[profile], **given)


def _nearest(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1, 0.4)
    return f"did you mean {near[0]!r}? " if near else ""
