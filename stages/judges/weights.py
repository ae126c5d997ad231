"""Public weights of the judges: a local folder, and a manifest that says what lies in it. Nothing is downloaded.

`judges.json` in the folder names, for each judge's weights, the file, its sha256, its licence and its source:

    {"format": 1, "weights": {"cnn14-16k": {"file": "Cnn14_16k_mAP=0.438.pth", "sha256": "…", "licence": "MIT", "source": "…"}}}

`describe_folder` writes it for files under their published names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.checkpoints import read_checkpoint, weights_of
from stages.errors import UserError
from stages.files import write_json

MANIFEST = "judges.json"
MANIFEST_FORMAT = 1
SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Provenance:
    """Where weights come from and what their licence allows."""

    file: str
    licence: str
    source: str


# The files that the published figures were made with (references.md#judges).
PUBLISHED: dict[str, Provenance] = {
    "vggish": Provenance("vggish-10086976.pth", "Apache-2.0", "github.com/harritaylor/torchvggish, release v0.1"),
    "cnn14-16k": Provenance("Cnn14_16k_mAP=0.438.pth", "MIT", "zenodo.org/records/3987831"),
    "cnn14-32k": Provenance("Cnn14_mAP=0.431.pth", "MIT", "zenodo.org/records/3987831"),
    "passt-s": Provenance("passt-s-f128-p16-s10-ap.476-swa.pt", "Apache-2.0", "github.com/kkoutini/PaSST, release v0.0.1-audioset"),
}


@dataclass(frozen=True)
class Weights:
    """The weights of one judge as they lie in the folder."""

    state: Mapping[str, Tensor]
    sha256: str
    provenance: Provenance
    path: Path


def read_weights(name: str, folder: str | Path) -> Weights:
    """The weights that the manifest of `folder` gives `name` (a key of `PUBLISHED`).

    Raises UserError when the manifest or the file is missing, is not what the manifest says, or is no file of plain weights.
    """
    folder = Path(folder)
    entries = read_manifest(folder)
    if name not in entries:
        unlisted = sorted({path.name for path in _weight_files(folder)} - {entry["file"] for entry in entries.values()})
        listed = f"it lists {', '.join(entries)}" if entries else "it lists nothing"
        loose = f"; not in the manifest: {', '.join(unlisted)}" if unlisted else ""
        wanted = PUBLISHED[name]
        raise UserError(
            f"{folder / MANIFEST} has no weights for {name!r} ({listed}{loose}); put {wanted.file} from {wanted.source} into the folder "
            f"and run `loa judges {folder}`"
        )
    entry = entries[name]
    path = folder / entry["file"]
    if not path.is_file():
        near = nearest(entry["file"], (file.name for file in _weight_files(folder)))
        raise UserError(f"{folder / MANIFEST} names {entry['file']} for {name!r}, which does not exist{near}")
    found = file_hash(path)
    if found != entry["sha256"]:
        raise UserError(
            f"{path} is not the file of the manifest: its sha256 is {found}, expected {entry['sha256']}; fetch it again from "
            f"{entry['source']}, or run `loa judges {folder}` if the new file is meant"
        )
    return Weights(weights_of(read_checkpoint(path), path), found, Provenance(entry["file"], entry["licence"], entry["source"]), path)


def read_manifest(folder: str | Path) -> dict[str, dict[str, str]]:
    """The entries of a folder's manifest by judge. Raises UserError when it is missing or malformed."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST}; put public weights there and run `loa judges {folder}` (docs/evaluation.md)")
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT or not isinstance(manifest.get("weights"), dict):
        raise UserError(f'{path} is no manifest of this version: expected {{"format": {MANIFEST_FORMAT}, "weights": {{…}}}}')
    for name, entry in manifest["weights"].items():
        if name not in PUBLISHED:
            raise UserError(
                f"{path} names weights for {name!r}, which no judge uses{nearest(name, PUBLISHED)}; there are {', '.join(PUBLISHED)}"
            )
        wanted = {"file", "sha256", "licence", "source"}
        if not isinstance(entry, dict) or set(entry) != wanted or not all(isinstance(value, str) for value in entry.values()):
            raise UserError(f"{path}: the entry of {name!r} must have exactly the texts {', '.join(sorted(wanted))}, got {entry!r}")
        if Path(entry["file"]).name != entry["file"]:
            raise UserError(f"{path}: {name!r} names {entry['file']!r}; expected a file of that folder, without a path")
    entries: dict[str, dict[str, str]] = manifest["weights"]
    return entries


def describe_folder(folder: str | Path) -> dict[str, dict[str, str]]:
    """Write the manifest of a folder from the files in it, and return its entries.

    Files under their published names are recognised; an entry written before keeps its licence and source, so other files
    (such as weights converted to safetensors) are named there by hand once.

    Raises UserError for weights that are neither published nor in the manifest.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; create it and put public weights there")
    before = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    known = {entry["file"]: (name, Provenance(entry["file"], entry["licence"], entry["source"])) for name, entry in before.items()}
    known = {public.file: (name, public) for name, public in PUBLISHED.items() if name not in before} | known
    entries = {}
    for path in _weight_files(folder):
        if path.name not in known:
            raise UserError(
                f"{path} is not a known file{nearest(path.name, known)}; remove it, rename it to the published name, or add it to "
                f"{folder / MANIFEST} by hand with file, sha256, licence and source"
            )
        name, provenance = known[path.name]
        entries[name] = {**asdict(provenance), "sha256": file_hash(path)}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "weights": entries})
    return entries


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of weights that come from no file."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; nearest: …" for an error message, or nothing when no name is near."""
    near = difflib.get_close_matches(name, list(names), 2, 0.4)
    return f"; nearest: {', '.join(near)}" if near else ""


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
