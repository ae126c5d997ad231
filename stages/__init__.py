"""The networks of AudioLDM 2 and how each is trained: plain PyTorch, no Ray, no MLflow, no web server."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.base import Stage

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


def stage_class(name: str) -> type[Stage]:
    """The Stage called `name`. Raises UserError with the nearest name for one that does not exist."""
    if name not in STAGES:
        from stages.base import UserError

        near = difflib.get_close_matches(name, STAGES, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown stage {name!r}{hint} Stages: {', '.join(STAGES)}")
    stage: type[Stage] = getattr(importlib.import_module(f"stages.{name}.training"), STAGES[name])
    return stage
