"""Whether the series of a store suit a stage: what does not is refused before a worker or a GPU is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stages.errors import UserError
from stages.files import Place, weights_hash

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore
    from pipelines.training.dataset import ClipDataset
    from stages.base import Stage
    from stages.variants import Variant


def require_suitable(cls: type[Stage], variant: Variant, store: FeatureStore, dataset: ClipDataset, folders: Mapping[str, Place]) -> None:
    """Compare the series that a stage reads with the encoders that it reads as well, by their recipes, and with the sizes of its variant.

    Args:
        dataset: its training clips, of which one is read.
        folders: the released weights, by stage.

    Raises UserError naming the series, what was found and what was expected.
    """
    recipes = store.recipes()
    for series in cls.reads(variant):
        recipe = recipes.get(series, {})
        encoder = recipe.get("encoder")
        if encoder in cls.builds_on(variant) and encoder in folders and (other := _other_weights(recipe, folders[encoder])):
            raise UserError(
                f"the series {series!r} of {store.root} was made with other weights of {encoder} ({other}) than those in "
                f"{folders[encoder]}, which {cls.name} uses beside it; give the ones that made it with --with {encoder}=FOLDER, or "
                f"delete {store.series_folder(series)} and make it again"
            )
        wanted = expected(variant, series)
        for member, array in dataset.clip(0, [series]).items():
            ends = wanted.get(member, ())
            if ends and np.shape(array)[-len(ends) :] != ends:
                raise UserError(
                    f"the series {series!r} of {store.root} holds {member} of {_sizes(np.shape(array))}, and {variant.name} expects "
                    f"{_sizes(ends)}{' at the end' if len(ends) < np.ndim(array) else ''}; give the variant and the --set that it was "
                    "made with, or make it again in another store"
                )


def expected(variant: Variant, series: str) -> dict[str, tuple[int, ...]]:
    """The last dimensions of the arrays of a series, by member; mels and waveforms are the store's own settings."""
    if series.startswith("loa-"):
        return {"loa": (variant.loa_tokens(int(series.removeprefix("loa-"))), variant.audiomae.width)}
    channels, frames, bins = variant.latent_shape
    clap = (variant.clap.projection_dim,)
    members: dict[str, dict[str, tuple[int, ...]]] = {
        "latent": {"latent": (2 * channels, frames, bins)},
        "text": {"clap_text": clap, "t5": (variant.t5.width,)},
        "speech": {"clap_audio": clap},
    }
    return members.get(series, {})


def _other_weights(recipe: Mapping[str, dict[str, str]], folder: Place) -> str:
    """Which of an encoder's weights in `folder` are not those that a recipe names; "" for none."""
    there = folder.local_copy()
    # A part is a folder of the release, or the release itself under its encoder's name.
    places = {part: there / part if (there / part).is_dir() else there for part in recipe["weights"]}
    return ", ".join(part for part, place in places.items() if weights_hash(place) != recipe["weights"][part])


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
