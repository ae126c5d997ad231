"""The networks of AudioLDM 2 and how each is trained: plain PyTorch, no Ray, no MLflow, no web server."""

from __future__ import annotations

import difflib

from stages.errors import UserError

# In training order; every name is a folder here, `<name>/training.py` holds the class.
STAGES: dict[str, str] = {
    "clap": "ClapStage",
    "audiomae": "AudioMAEStage",
    "vae": "VAEStage",
    "vocoder": "VocoderStage",
    "translator": "TranslatorStage",
    "diffusion": "DiffusionStage",
    "joint": "JointStage",
    "classifier": "ClassifierStage",
}


def require_stage(name: str) -> None:
    """Raise UserError, with the nearest name, unless there is a stage called `name`."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown stage {name!r}; {hint}Stages: {', '.join(STAGES)}")
