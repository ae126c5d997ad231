"""WebDataset: tars in which the members of a sample share a name: `0001.flac` with `0001.json`, `0001.txt` or `0001.cls`."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.corpora.fields import dealt, shards, split_of, words
from pipelines.corpora.files import MALFORMED, MISSING, is_audio, printable, safe_id, texts
from pipelines.corpora.records import Record, Rejected
from stages.recordings import stretch_of

LAYOUT = "WebDataset tars (*.tar with sounds beside .json, .txt or .cls)"
CORPUS = "webdataset"
CLASSES = "classnames.txt"  # beside the tars: the names of the numbers in .cls, one per line
DAMAGED = "malformed tar"
LONGEST_TEXT = 1 << 20  # bytes of a .json, .txt or .cls
_LOOKED_AT = 64  # members, to see whether a tar holds sound


def detect(root: Path) -> bool:
    """Whether the folder holds tars with sound among their first members."""
    for path in shards(root, ".tar"):
        try:
            with tarfile.open(path, "r:") as tar:
                for number, member in enumerate(tar):
                    if is_audio(member.name):
                        return True
                    if number >= _LOOKED_AT:
                        break
        except (tarfile.TarError, OSError):
            continue
    return False


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """Every sound of every tar with the texts of its sample. The sounds stay where they are, addressed by their bytes.

    A .json holds the columns of a folder's table, a .txt one caption per line, a .cls the class. Splits come from "split" in the
    .json or from the name of the tar or its folder; where nothing is held out they are dealt by a hash of the sample's name.
    """
    root = Path(os.path.abspath(root))
    tars = shards(root, ".tar")
    splits = {split_of(path) for path in tars}
    classes = _class_names(root)
    for path in shards(root, ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"):
        yield Rejected(CORPUS, printable(str(path)), "", "compressed tar: single members of it cannot be read; unpack it to .tar")
    nameless = False
    for path in tars:
        for members in _samples(path):
            if isinstance(members, Rejected):
                yield members
                continue
            row = _texts(members)
            number = row.pop("cls", "")
            if number.isdigit():
                nameless |= int(number) >= len(classes)
                number = classes[int(number)] if int(number) < len(classes) else ""
            row["label"] = [*texts(row.get("label")), *texts(number)]
            yield from _recordings(root, path, members, row, splits)
    if nameless:
        yield Rejected(CORPUS, str(root / CLASSES), "", f"{MISSING}: the numbers in .cls that it does not name are no labels")


Members = Mapping[str, tuple[int, int, bytes]]  # suffix → offset, length, and the content of texts


def _recordings(root: Path, path: Path, members: Members, row: dict[str, Any], splits: set[str]) -> Iterator[Record]:
    key = row.pop("key")
    place = f"{root.name}_{path.relative_to(root).as_posix().removesuffix('.tar')}_{key}"
    sounds = [suffix for suffix in members if is_audio(f"x.{suffix}")]
    if not sounds:
        yield Rejected(CORPUS, printable(str(path)), f"{CORPUS}-{safe_id(place)}", f"{MISSING}: the sample {printable(key)} has no sound")
        return
    problem = row.pop("problem", "")
    said = words(row)
    if said.split is None:
        problem = f"unknown split in the .json of {printable(key)}"
    for suffix in sounds:
        recording_id = safe_id(place if len(sounds) == 1 else f"{place}.{suffix}")
        offset, length, _ = members[suffix]
        address = stretch_of(str(path), offset, length)
        if problem:
            yield Rejected(CORPUS, printable(address), f"{CORPUS}-{recording_id}", f"{MALFORMED}: {problem}")
            continue
        yield said.record(CORPUS, recording_id, address, dealt(recording_id, split_of(path), splits))


def _samples(path: Path) -> Iterator[dict[str, tuple[int, int, bytes]] | Rejected]:
    """The samples of a tar by suffix, with their key under "key"; what follows a damage is lost, and said."""
    try:
        with tarfile.open(path, "r:") as tar:
            size = path.stat().st_size
            for key, group in groupby((member for member in tar if member.isreg() and not member.issparse()), key=_key):
                members = {"key": (0, 0, key.encode("utf-8", "surrogateescape"))}
                for member in group:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"cut off within {member.name}")
                    suffix = member.name[len(key) + 1 :].lower()
                    content = b""
                    if suffix in ("json", "txt", "cls") and member.size <= LONGEST_TEXT:
                        stream = tar.extractfile(member)
                        content = stream.read() if stream else b""
                    members[suffix] = (member.offset_data, member.size, content)
                yield members
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Rejected(CORPUS, printable(str(path)), "", f"{DAMAGED}: {error}; what follows is not read")


def _key(member: tarfile.TarInfo) -> str:
    """A member's name up to the first dot of its last part, which the members of a sample share."""
    folder, _, name = member.name.rpartition("/")
    stem = name.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _texts(members: Members) -> dict[str, Any]:
    """The columns that the texts of a sample say, its "key", its class as "cls", and a "problem" where there is one."""
    row: dict[str, Any] = {"key": members["key"][2].decode("utf-8", "surrogateescape")}
    try:
        if "json" in members:
            content = json.loads(members["json"][2])
            if not isinstance(content, dict):
                raise ValueError("not an object")
            row |= {name: value for name, value in content.items() if name not in ("key", "cls", "problem")}
        if "txt" in members:
            lines = members["txt"][2].decode("utf-8-sig").splitlines()
            row["caption"] = [*texts(row.get("caption")), *texts(lines)]
        row["cls"] = members["cls"][2].decode("utf-8").strip() if "cls" in members else ""
    except (ValueError, RecursionError) as error:
        row["problem"] = f"the texts of {printable(row['key'])}: {error}"
    return row


def _class_names(root: Path) -> Sequence[str]:
    path = root / CLASSES
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else ()
