"""Million Song Dataset with the ECALS annotation: tags per track, and previews found through the Last.fm tables."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.corpora.files import MISSING, hash_split, inside, read_json, safe_id, texts, tidy
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "Million Song Dataset (ecals_annotation/annotation.json, lastfm_annotation/*.pkl beside audio/)"
LICENCE = "research use"
CORPUS = "msd"
PUBLISHED_COUNTS = {"tracks": 517_022}  # ECALS, arXiv 2211.14558: the tracks with tags and a preview
ANNOTATION = Path("ecals_annotation") / "annotation.json"
TRACK_SPLIT = Path("ecals_annotation") / "ecals_track_split.json"
TRACK_TO_PREVIEW = Path("lastfm_annotation") / "MSD_id_to_7D_id.pkl"
PREVIEW_TO_PATH = Path("lastfm_annotation") / "7D_id_to_path.pkl"
_LISTS = {"train_track": "train", "extra_track": "train", "valid_track": "validation", "test_track": "test"}


def detect(root: Path) -> bool:
    """Whether the folder holds the ECALS annotation."""
    return (root / ANNOTATION).is_file()


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The annotated tracks: the tags are the labels. Two captions: the tags, and the tags with title and artist.

    The paper's words for MSD are "tags, titles, artists". The split is ECALS'; tracks of none of its lists are training, and
    without the list a hash of the artist decides, so that no two splits share one.
    """
    loaded: dict[Path, Any] = {ANNOTATION: {}, TRACK_SPLIT: {}, TRACK_TO_PREVIEW: {}, PREVIEW_TO_PATH: {}}
    for name in loaded:
        try:
            if name.suffix == ".json":
                value = read_json(root / name)
            else:
                with (root / name).open("rb") as stream:
                    value = load_plain_pickle(stream)
            if not isinstance(value, dict):
                raise ValueError("expected a dict")
            loaded[name] = value
        except FileNotFoundError:
            yield Rejected(CORPUS, str(root / name), "", MISSING)
        except ValueError as error:
            yield Rejected(CORPUS, str(root / name), "", f"malformed file: {error}")
    splits = {track: split for key, split in _LISTS.items() for track in texts(loaded[TRACK_SPLIT].get(key, []))}
    paths = {str(preview): path for preview, path in loaded[PREVIEW_TO_PATH].items()}
    for track, entry in sorted(loaded[ANNOTATION].items()):
        recording_id = safe_id(track)
        preview = str(loaded[TRACK_TO_PREVIEW].get(track))
        relative = paths.get(preview)
        path = inside(root / "audio", relative) if isinstance(relative, str) else None
        if path is None or not Path(path).is_file():
            reason = MISSING if path else f"{MISSING}: {'the path leaves the corpus' if relative else 'no preview is known'}"
            yield Rejected(CORPUS, path or str(root / "audio"), f"{CORPUS}-{recording_id}", reason)
            continue
        entry = entry if isinstance(entry, dict) else {}
        tags = texts(entry.get("tag", []))
        yield Recording(
            CORPUS,
            recording_id,
            path,
            captions=_captions(tags, tidy(entry.get("title")), tidy(entry.get("artist_name"))),
            labels=tags,
            split=splits.get(track, "train") if splits else hash_split(tidy(entry.get("artist_name")) or track),
            licence=LICENCE,
            origin=f"msd:{track}",
        )


def _captions(tags: tuple[str, ...], title: str, artist: str) -> tuple[str, ...]:
    heading = " by ".join(filter(None, (title, artist)))
    with_heading = f"{heading}: {', '.join(tags)}" if tags else heading
    return tuple(dict.fromkeys(filter(None, (", ".join(tags), with_heading if heading else ""))))


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only dicts, lists, tuples, texts and numbers are read")


def load_plain_pickle(stream: BinaryIO) -> Any:
    """Read a pickle of builtin containers, texts and numbers, and nothing that could run code.

    Raises ValueError for a damaged file and for one that asks for any class or function.
    """
    try:
        return _PlainUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"not a plain pickle ({error})") from None
