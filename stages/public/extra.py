"""The extra `clap`: how it is installed, and what is wrong where torch and torchvision do not go together. Imports neither."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

# `===` takes both as one index has them. `==` would also take a CPU wheel that lies at hand, beside a torchvision for CUDA.
INSTALL = "pip install -e '.[clap]' torch===2.13.0 torchvision===0.28.0"


def torchvision_fault() -> str | None:
    """A sentence where torchvision is installed but cannot be imported beside this torch; None where all is well."""
    try:
        found = {name: version(name) for name in ("torch", "torchvision")}
    except PackageNotFoundError:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"torchvision {found['torchvision']} does not work beside torch {found['torch']} ({reason}). They have to be releases that "
            "belong together, and builds of one kind, both for the CPU or both for CUDA. Only `loa import --verify` needs torchvision: "
            f"`pip uninstall torchvision`, or install both anew, in an environment of its own: `{INSTALL}`"
        )
    return None
