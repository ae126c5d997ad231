"""Captions of a person's folder in the forms in which people have them, and what is said of those that cannot be used."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from pipelines import corpora
from pipelines.corpora import Recording, Rejected
from pipelines.corpora.files import decode


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two recordings, one of them in a folder below. Nothing opens them, so they need not sound."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "dog.wav").touch()
    (tmp_path / "deep" / "rain.flac").touch()
    return tmp_path


def read(root: Path) -> tuple[dict[str, Recording], list[Rejected]]:
    records = list(corpora.read("folder", root))
    return {Path(r.path).stem: r for r in records if isinstance(r, Recording)}, [r for r in records if isinstance(r, Rejected)]


TABLE = [("file", "caption"), ("dog.wav", "A dog, barking"), ("deep/rain.flac", "Rain… on a café")]


def written(rows, delimiter=","):
    quoted = [[f'"{cell}"' if delimiter in cell else cell for cell in row] for row in rows]
    return "\n".join(delimiter.join(row) for row in quoted) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", written(TABLE).encode()),
        ("captions.csv", written(TABLE, ";").encode()),
        ("captions.csv", written(TABLE, "\t").encode("utf-16")),
        ("captions.csv", written(TABLE, ";").encode("cp1252")),
        ("captions.csv", written(TABLE, ";").encode("utf-16-le")),
        ("captions.tsv", written(TABLE, "\t").encode("utf-8-sig")),
        ("captions.txt", written(TABLE, "|").encode()),
        ("captions.txt", written(TABLE[1:], "\t").encode()),
        ("captions.csv", "dog.wav,A dog, barking\ndeep/rain.flac,Rain… on a café\n".encode()),
        ("captions.csv", written([("File Name", "Text"), *TABLE[1:]], ";").encode()),
        ("captions.csv", written([("id", "audio", "caption_1"), *[("7", *row) for row in TABLE[1:]]], ";").encode()),
        ("my list.csv", written(TABLE, ";").encode()),
        ("captions.csv", written([TABLE[0], ("dog", TABLE[1][1]), ("rain", TABLE[2][1])]).encode()),
        ("captions.csv", written([TABLE[0], ("DOG.mp3", TABLE[1][1]), (r"deep\rain.wav", TABLE[2][1])]).encode()),
        ("captions.csv", written([TABLE[0], ("/home/me/x/dog.wav", TABLE[1][1]), ("/home/me/x/deep/rain.flac", TABLE[2][1])]).encode()),
        ("captions.json", json.dumps([dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]]).encode()),
        ("captions.json", json.dumps({"data": [{"file_name": f, "text": [c]} for f, c in TABLE[1:]]}, ensure_ascii=False).encode("utf-16")),
        ("metadata.json", json.dumps(dict(TABLE[1:])).encode()),
        ("words.json", json.dumps({file: {"captions": [caption]} for file, caption in TABLE[1:]}).encode()),
        ("metadata.jsonl", "\n".join(json.dumps({"file_name": f, "text": c}) for f, c in TABLE[1:]).encode()),
    ],
)
def test_tables_that_people_have(root, name, content):
    (root / name).write_bytes(content)
    found, rejected = read(root)
    assert {stem: r.captions for stem, r in found.items()} == {"dog": ("A dog, barking",), "rain": ("Rain… on a café",)}
    assert rejected == []


def test_a_table_beside_the_folder_of_sounds(root):
    (root / "lists").mkdir()
    (root / "lists" / "captions.csv").write_text(written(TABLE))
    found, rejected = read(root)
    assert found["dog"].captions == ("A dog, barking",) and found["rain"].captions and not rejected


def test_several_captions(root):
    (root / "captions.csv").write_text("file,caption_1,caption_2\ndog,One.,Two.\ndog.wav,Three.,One.\n")
    (root / "deep" / "rain.txt").write_bytes("Regen fällt\r\n\r\nNoch mehr\r\n".encode("cp1252"))
    found, rejected = read(root)
    assert found["dog"].captions == ("One.", "Two.", "Three.") and found["rain"].captions == ("Regen fällt", "Noch mehr")
    assert not rejected


def test_a_json_file_beside_a_recording(root):
    (root / "dog.json").write_text(json.dumps({"caption": "A dog.", "tags": ["dog"], "license": "CC0", "id": 3}))
    found, rejected = read(root)
    assert (found["dog"].captions, found["dog"].labels, found["dog"].licence) == (("A dog.",), ("Dog",), "CC0") and not rejected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", "sound;words\ndog.wav;A dog\n", "its columns are sound, words; expected one that names the recording"),
        ("notes.csv", "day,weather\n1,rain\n", "its columns are day, weather; expected one"),
        ("captions.csv", "file\ndog.wav\n", "its columns are file; expected .* at least one of caption, label"),
        ("metadata.jsonl", '{"a": 1, "b": 2}\n', "its columns are a, b; expected"),
        ("captions.csv", "file,caption\ncat.wav,A cat\ncow.wav,A cow\n", "none of its 2 rows names a recording; the first names 'cat.wav'"),
        ("captions.json", "3", "a single value; expected an array"),
    ],
)
def test_a_table_of_no_use_is_told(root, name, content, said):
    (root / name).write_text(content)
    found, rejected = read(root)
    assert len(found) == 2
    (told,) = [r for r in rejected if r.kind == "caption table not used"]
    assert told.path == str(root / name)
    assert re.search(said, told.reason), told.reason


def test_captions_that_are_none(root):
    rows = [{"file": "dog.wav", "caption": text} for text in ("", None, {"a": 1}, "???", "x" * 10_000, "A dog.")]
    (root / "captions.json").write_text(json.dumps(rows))
    found, rejected = read(root)
    assert found["dog"].captions == ("A dog.",)
    assert Counter(r.kind for r in rejected) == {"empty caption": 3, "caption without words": 1, "caption too long": 1}
    (long,) = [r.reason for r in rejected if r.kind == "caption too long"]
    assert "10,000 characters, at most 2,000" in long and len(long) < 200


def test_names_that_may_mean_several(root):
    (root / "dog.flac").touch()  # the same name, so the same words
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "x.wav").touch()
    (root / "captions.csv").write_text("file,caption\ndog,A dog.\nx,What?\nb/x,Which.\nc/x.wav,Gone.\n")
    records = list(corpora.read("folder", root))
    captions = {Path(r.path).relative_to(root).as_posix(): r.captions for r in records if isinstance(r, Recording)}
    assert captions["dog.wav"] == captions["dog.flac"] == ("A dog.",)
    assert captions["a/x.wav"] == () and captions["b/x.wav"] == ("Which.",)
    reasons = [r.reason for r in records if isinstance(r, Rejected)]
    assert len(reasons) == 2 and "'x' may mean" in reasons[0] and reasons[1] == "missing file"


def test_texts_in_any_encoding():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"):
        assert decode("Grün, „Regen“\n".encode(encoding)) == "Grün, „Regen“\n"
    assert decode(b"") == "" and isinstance(decode(bytes(range(256))), str)
