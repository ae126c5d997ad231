"""WavCaps: `json_files/<source>/*.json` with captions, and the recordings of each source by id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.files import (
    MISSING,
    AudioFiles,
    BadLine,
    hash_split,
    json_entries,
    read_json,
    safe_id,
    split_named,
    texts,
    tidy,
)
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "WavCaps (json_files/<source>/*.json beside audio/<source>/)"
LICENCE = "WavCaps, academic use"
CORPUS = "wavcaps"
PUBLISHED_COUNTS = {"recordings": 403_050}  # arXiv 2303.17395, table 1
BLACKLISTED = "blacklisted"
# A source's part of the blacklists is not always called like the source.
_BLACKLIST_KEYS = {"AudioSet_SL": ("AudioSet_SL", "AudioSet")}


def detect(root: Path) -> bool:
    """Whether the folder holds metadata of WavCaps."""
    return any(_sources(root))


def read(root: Path, keep_blacklisted: bool = False, follow_links: bool = False) -> Iterator[Record]:
    """The recordings of every source with their caption; FreeSound's tags are their labels.

    What `json_files/blacklist/*.json` names is rejected: it occurs in test sets of AudioCaps and others. WavCaps has
    no splits, so recordings are dealt by a hash of their id. Two keys that WavCaps itself does not use may stand
    in an entry: "split", which overrides the hash, and "licence".
    """
    banned: dict[str, dict[str, str]] = {}
    for path in [] if keep_blacklisted else sorted((root / "json_files" / "blacklist").glob("*.json")):
        try:
            for source, names in read_json(path).items():
                banned.setdefault(source, {}).update((_stem(tidy(name)), path.stem) for name in names)
        except (ValueError, AttributeError, TypeError) as error:
            yield Rejected(CORPUS, str(path), "", f"malformed blacklist: {error}; nothing of it is left out")
    for source in _sources(root):
        folder = source.name
        files = AudioFiles(*_audio_folders(root, folder), root=root, follow_links=follow_links)
        keys = _BLACKLIST_KEYS.get(folder, (folder,))
        for table in sorted(source.glob("*.json")):
            for entry in json_entries(table, "data"):
                if isinstance(entry, BadLine):
                    yield entry.rejected(CORPUS)
                    continue
                line, item = entry
                name = _stem(tidy(item.get("id")))
                split = item.get("split")
                if not name or (split is not None and split_named(str(split)) is None):
                    problem = f"unknown split {split!r}" if name else "an entry without an id"
                    yield BadLine(table, line, problem).rejected(CORPUS)
                    continue
                recording_id = safe_id(f"{folder}_{name}")
                path_or_none = files.find(name)
                reason = next((banned[key][name] for key in keys if name in banned.get(key, {})), None)
                if reason is not None or path_or_none is None:
                    why = MISSING if reason is None else f"{BLACKLISTED}: {reason}"
                    path_text = path_or_none or str(root / "audio" / folder / name)
                    yield Rejected(CORPUS, path_text, f"{CORPUS}-{recording_id}", why)
                    continue
                yield Recording(
                    CORPUS,
                    recording_id,
                    path_or_none,
                    captions=texts(item.get("caption")),
                    labels=texts(item.get("tags")),
                    split=split_named(str(split)) or hash_split(recording_id),
                    licence=tidy(item.get("licence")) or LICENCE,
                    origin=f"youtube:{name[1:]}" if folder == "AudioSet_SL" else f"{folder.lower()}:{name}",
                )
        yield from files.unlisted(CORPUS)


def _sources(root: Path) -> list[Path]:
    tables = (root / "json_files").glob("*/*.json")
    return sorted({path.parent for path in tables if path.parent.name != "blacklist"})


def _audio_folders(root: Path, source: str) -> list[Path]:
    """Where a source's recordings lie: as published, and as the usual unpacking scripts leave them."""
    names = (source, f"{source}_flac")
    folders = [root / base / name for base in ("audio", "waveforms", ".") for name in names]
    return [folder for folder in folders if folder.is_dir()]


def _stem(name: str) -> str:
    """An id without the ".wav" that AudioSet's ids carry."""
    return name.removesuffix(".wav").removesuffix(".flac")
