"""The readers of VGGSound, FMA, MusicCaps, Clotho, WebDataset tars and Hugging Face data sets, in the published layouts and broken ones."""

import io
import json
import os
import random
import re
import shutil
import tarfile
import types
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner

from pipelines import corpora
from pipelines.corpora import Recording, Rejected, clotho, fma, hf_datasets, musiccaps, vggsound, webdataset_tars
from pipelines.corpora.csv_records import csv_records
from pipelines.corpora.files import BadLine
from pipelines.corpora.headers import probe_header
from pipelines.features.passes import read_recording
from pipelines.features.store import FeatureStore
from pipelines.ingest import ingest, main
from stages.audio import AudioConfig, load_audio
from stages.errors import UserError

RATE = 16_000
AUDIO = AudioConfig(clip_seconds=1.0)


def tone(seconds: float = 1.0, pitch: float = 0.1) -> np.ndarray:
    return (0.1 * np.sin(np.arange(round(seconds * RATE)) * pitch)).astype(np.float32)


def encoded(seconds: float = 1.0, pitch: float = 0.1, kind: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds, pitch), RATE, format=kind)
    return buffer.getvalue()


def sound(path: Path, seconds: float = 1.0, pitch: float | None = None) -> Path:
    """A tone, by default another one for every name: exact copies are taken once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, pitch or 0.1 + zlib.crc32(path.name.encode()) / 2**33), RATE)
    return path


def split(records) -> tuple[list[Recording], list[Rejected]]:
    records = list(records)
    return [r for r in records if isinstance(r, Recording)], [r for r in records if isinstance(r, Rejected)]


def kinds(rejected) -> Counter:
    return Counter(r.kind for r in rejected)


# ------------------------------------------------------------------------------------------------ published corpora


def make_vggsound(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "vggsound.csv").write_bytes(
        b'\xef\xbb\xbf---fake_0001,1,people marching,test\n---fake_0002,30,"bird chirping, tweeting",train\n'
        b"---fake_0003,140,dog barking,train\n---fake_0004,x,dog barking,train\n---fake_0005,3,dog barking\n"
        b"---fake_0006,3,dog barking,train,more\n\xff,3,dog barking,train\n---fake_0007,3,dog barking,sometimes\n"
    )
    sound(root / "audio" / "---fake_0001_000001.flac", 10.0)
    sound(root / "audio" / "---fake_0002_000030.wav", 10.0)
    sound(root / "audio" / "nobody.wav")


def test_vggsound(tmp_path):
    make_vggsound(tmp_path / "vgg")
    good, bad = split(vggsound.read(tmp_path / "vgg"))
    assert [(r.recording_id, r.labels, r.start, r.seconds, r.origin) for r in good] == [
        ("---fake_0001_000001", ("people marching",), 1.0, 10.0, "youtube:---fake_0001"),
        ("---fake_0002_000030", ("bird chirping, tweeting",), 30.0, 10.0, "youtube:---fake_0002"),
    ]
    assert good[0].split == "test" and good[1].split in ("train", "validation") and {r.licence for r in good} == {"labels CC BY 4.0"}
    assert kinds(bad) == {"malformed line": 5, "missing file": 1, "not listed": 1}
    report = ingest([tmp_path / "vgg"], tmp_path / "store", AudioConfig(), workers=0)
    (counts,) = report.corpora
    said = corpora.coverage(counts.corpus, counts.recordings, counts.rejected)
    assert said == "vggsound: 2 found, 1 missing, 5 broken of 199,467 published"


def test_some_of_vggsound_is_held_out_for_validation(tmp_path):
    lines = [f"fake{i:07d},0,dog barking,train" for i in range(400)]
    (tmp_path / "vggsound.csv").write_text("\n".join(lines))
    for i in range(400):
        (tmp_path / f"fake{i:07d}.wav").touch()
    shares = Counter(r.split for r in split(vggsound.read(tmp_path))[0])
    assert 5 < shares["validation"] < 40 and shares["train"] == 400 - shares["validation"]


FMA_HEAD = "{bom},album,artist,set,set,track,track,track,track\n,title,bio,split,subset,genre_top,genres,license,title\ntrack_id,,,,,,,,\n"


def make_fma(root: Path, bom: str = "") -> None:
    (root / "fma_metadata").mkdir(parents=True)
    rows = [
        '2,"Album, one","A bio of two lines:\n""quoted"", and more",training,small,Hip-Hop,[21],Attribution 3.0 International,Food',
        '3,,,validation,medium,,"[12, 21]",Public Domain,Song',
        "5,,,test,large,Rock,[12],,Last",
        '7,,"a quote that never ends,training,small,Rock,[12],,x',
        "10,,,test,small,Rock,[12],CC0,Ten",
        "11,,,sometimes,small,Rock,[12],CC0,x",
        "x1,,,test,small,Rock,[12],CC0,x",
        "12,,,test,small",
        "20,,,test,small,Rock,[12],CC0,gone",
    ]
    (root / "fma_metadata" / "tracks.csv").write_text(FMA_HEAD.format(bom=bom) + "\n".join(rows) + "\n", encoding="utf-8")
    (root / "fma_metadata" / "genres.csv").write_text("genre_id,#tracks,parent,title,top_level\n12,1,0,Rock,12\n21,1,0,Hip-Hop,21\n")
    for track in (2, 3, 5, 10):
        sound(root / "fma_large" / f"{track:06d}"[:3] / f"{track:06d}.mp3", 2.0)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_fma(tmp_path, bom):
    make_fma(tmp_path / "fma", bom)
    good, bad = split(fma.read(tmp_path / "fma"))
    assert [(r.recording_id, r.labels, r.split, r.licence) for r in good] == [
        ("000002", ("Hip-Hop",), "train", "Attribution 3.0 International"),
        ("000003", ("Rock", "Hip-Hop"), "validation", "Public Domain"),
        ("000005", ("Rock",), "test", fma.LICENCE),
        ("000010", ("Rock",), "test", "CC0"),
    ]
    assert kinds(bad) == {"malformed line": 4, "missing file": 1}
    shutil.move(tmp_path / "fma" / "fma_large", tmp_path / "fma" / "fma_small")
    good, bad = split(fma.read(tmp_path / "fma"))  # of a small copy, what belongs to the larger ones is not missing
    assert [r.recording_id for r in good] == ["000002", "000010"] and kinds(bad)["missing file"] == 1


def test_fma_is_read_only_when_asked_for(tmp_path):
    make_fma(tmp_path / "data" / "fma")
    with pytest.raises(UserError, match="fma, which is read only when asked for: add `--include fma`"):
        ingest([tmp_path / "data"], tmp_path / "store", AUDIO, workers=0)
    sound(tmp_path / "data" / "own.wav")
    said: list[str] = []
    report = ingest([tmp_path / "data"], tmp_path / "store", AUDIO, workers=0, say=said.append)
    assert [c.corpus for c in report.corpora] == ["folder"] and report.corpora[0].recordings == 1 and "--include fma" in said[0]
    run = CliRunner().invoke(main, [str(tmp_path / "data"), "--work", str(tmp_path / "w"), "--include", "fma", "--workers", "0"])
    assert run.exit_code == 0 and "fma: 4 found, 1 missing, 4 broken of 106,574 published" in run.output, run.output
    assert set(FeatureStore.open(tmp_path / "w" / "store").clips()["corpus"]) == {"fma", "folder"}


def test_musiccaps_is_for_evaluation_and_leaves_training(tmp_path):
    caps, audioset = tmp_path / "data" / "musiccaps", tmp_path / "data" / "audioset"
    caps.mkdir(parents=True)
    (caps / "musiccaps-public.csv").write_text(
        "\ufeffytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval\n"
        'fake0000001,30,40,"/m/1,/m/2","[\'low quality\', \'piano\']","A piano,\nslow.",4,False,True\n'
        "fake0000002,0,10,/m/1,[],Drums,4,False,False\n"
        "fake0000003,0,10,/m/1,[],,4,False,False\nfake0000004,0,10\nfake0000005,9,3,/m/1,[],Drums,4,False,False\n"
        "fake0000006,0,10,/m/1,[],Gone,4,False,False\n",
        encoding="utf-8",
    )
    sound(caps / "wav" / "[fake0000001]-[30-40].wav", 10.0)
    sound(caps / "wav" / "fake0000002.wav", 10.0, 0.2)
    good, bad = split(musiccaps.read(caps))
    assert [(r.recording_id, r.captions, r.split, r.start) for r in good] == [
        ("fake0000001", ("A piano, slow.",), "test", 30.0),
        ("fake0000002", ("Drums",), "test", 0.0),
    ]
    assert kinds(bad) == {"malformed line": 3, "missing file": 1}

    audioset.mkdir()
    (audioset / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/1,"Music"\n')
    (audioset / "balanced_train_segments.csv").write_text('fake0000002, 0.000, 10.000, "/m/1"\nfake0000009, 0.000, 10.000, "/m/1"\n')
    for name in ("fake0000002", "fake0000009"):
        sound(audioset / "audio" / f"{name}.wav", 10.0, 0.3)
    report = ingest([tmp_path / "data"], tmp_path / "store", AudioConfig(), workers=0)
    clips = FeatureStore.open(tmp_path / "store").clips()
    assert sorted(zip(clips["corpus"], clips["clip_id"], strict=True)) == [
        ("audioset", "audioset-fake0000009"),
        ("musiccaps", "musiccaps-fake0000001"),
        ("musiccaps", "musiccaps-fake0000002"),
    ]
    assert report.splits["test"] == 2


CLOTHO_CAPTIONS = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n"
CLOTHO_METADATA = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"


def make_clotho(root: Path) -> None:
    root.mkdir(parents=True)
    for number, name in enumerate(("development", "validation", "evaluation")):
        (root / f"clotho_captions_{name}.csv").write_text(
            f'{CLOTHO_CAPTIONS}{name} 1.wav,"One, {name}",Two,Three,Two,Five\nCafé.wav,a,b,c,d,e\n'
            "short.wav,a,b\n,a,b,c,d,e\ngone.wav,a,b,c,d,e\n",
            encoding="utf-8",
        )
        (root / f"clotho_metadata_{name}.csv").write_bytes(
            (CLOTHO_METADATA + f'{name} 1.wav,a;b,12{number},https://x,"[1, 2]",someone,http://licences/{name}\n').encode()
            + "Café.wav,é,Not found,x,[],é,http://licences/by\n".encode("latin-1")
        )
        sound(root / name / f"{name} 1.wav", 2.0, 0.1 + number / 10)
        sound(root / name / "Café.wav", 2.0, 0.5 + number / 10)


def test_clotho_is_for_evaluation_and_says_each_licence(tmp_path):
    make_clotho(tmp_path / "clotho")
    good, bad = split(clotho.read(tmp_path / "clotho"))
    assert Counter(r.split for r in good) == {"validation": 4, "test": 2} and len({r.recording_id for r in good}) == 6
    first = good[0]
    assert first.captions == ("One, development", "Two", "Three", "Five") and first.origin == "freesound:120"
    assert [r.licence for r in good[:2]] == ["http://licences/development", "http://licences/by"] and good[1].origin == ""
    assert kinds(bad) == {"malformed line": 6, "missing file": 3}
    os.remove(tmp_path / "clotho" / "clotho_metadata_evaluation.csv")
    good, bad = split(clotho.read(tmp_path / "clotho"))
    assert len(good) == 6 and kinds(bad)["missing file"] == 4 and good[-1].licence == clotho.LICENCE


def test_every_row_of_a_published_corpus_has_its_licence(tmp_path):
    make_vggsound(tmp_path / "vggsound")
    make_fma(tmp_path / "fma")
    make_clotho(tmp_path / "clotho")
    ingest([tmp_path], tmp_path / "store", AUDIO, include=["fma"], workers=0)
    clips = FeatureStore.open(tmp_path / "store").clips()
    licences = {corpus: set(rows["licence"]) for corpus, rows in clips.groupby("corpus")}
    assert licences == {
        "vggsound": {"labels CC BY 4.0"},
        "fma": {"Attribution 3.0 International", "Public Domain", "CC0", fma.LICENCE},
        "clotho": {"http://licences/by", *(f"http://licences/{name}" for name in ("development", "validation", "evaluation"))},
    }


def test_what_is_for_evaluation_is_never_training(tmp_path, monkeypatch):
    assert corpora.EVALUATION_ONLY == ["musiccaps", "clotho"]
    careless = Recording("clotho", "a", str(tmp_path / "a.wav"), split="train")
    monkeypatch.setattr(clotho, "read", lambda root: iter([careless, Rejected("clotho", "", "", "x")]))
    assert [getattr(r, "split", None) for r in corpora.read("clotho", tmp_path)] == ["test", None]


# ------------------------------------------------------------------------------------------------------ WebDataset


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_webdataset_tars(tmp_path):
    long_name = "folder/" + "n" * 120  # needs an extended header, which moves the data
    write_tar(
        tmp_path / "train-000000.tar",
        [
            ("a.flac", encoded(1.0, 0.1)),
            ("a.json", json.dumps({"caption": ["One", "Two"], "label": "Dog;Bark", "license": "CC0"}).encode()),
            ("a.txt", b"From the text\n"),
            ("b.wav", encoded(2.0, 0.2, "WAV")),
            ("b.cls", b"1\n"),
            (f"{long_name}.mp3", encoded(1.5, 0.3, "MP3")),
            (f"{long_name}.cls", b"Rain"),
            ("silent.json", b"{}"),
            ("broken.ogg", encoded(1.0, 0.4, "OGG")),
            ("broken.json", b"{"),
            ("c.ogg", encoded(1.0, 0.5, "OGG")),
            ("c.cls", b"99"),
        ],
    )
    write_tar(tmp_path / "test-000000.tar", [("d.left.wav", encoded(1.0, 0.1, "WAV")), ("d.right.wav", encoded(1.0, 0.2, "WAV"))])
    write_tar(tmp_path / "more.tar.gz", [("e.wav", encoded())], "w:gz")
    (tmp_path / "classnames.txt").write_text("Cat\nCow\n")
    assert corpora.discover(tmp_path) == [("webdataset", tmp_path)]
    good, bad = split(corpora.read("webdataset", tmp_path))
    by_key = {r.recording_id.rpartition("000000_")[2][:1]: r for r in good if "_test-" not in r.recording_id}
    assert (
        by_key["a"].captions == ("One", "Two", "From the text") and by_key["a"].labels == ("Dog", "Bark") and by_key["a"].licence == "CC0"
    )
    assert by_key["b"].labels == ("cow",) and by_key["c"].labels == () and by_key["f"].labels == ("Rain",)
    assert Counter(r.split for r in good) == {"train": 4, "test": 2} and len({r.recording_id for r in good}) == 6
    assert kinds(bad) == {"compressed tar": 1, "missing file": 2, "malformed line": 1}
    for key, seconds, pitch, within in (("a", 1.0, 0.1, 1e-4), ("b", 2.0, 0.2, 1e-4), ("f", 1.5, 0.3, 0.05)):
        assert probe_header(by_key[key].path) == (pytest.approx(seconds, abs=0.1), "")
        heard = read_recording(by_key[key].path, RATE, 0.25, 0.5)
        assert np.abs(heard - tone(2.0, pitch)[RATE // 4 : RATE * 3 // 4]).max() < within or key == "f"

    report = ingest([tmp_path], tmp_path / "store", AUDIO, workers=0)
    assert report.corpora[0].recordings == 6 and corpora.coverage("webdataset", 6, {}) == ""


def test_a_damaged_tar_keeps_what_comes_before(tmp_path):
    whole = write_tar(tmp_path / "a" / "0.tar", [(f"{i}.wav", encoded(0.5, 0.1 * i, "WAV")) for i in range(1, 6)]).read_bytes()
    (tmp_path / "a" / "0.tar").write_bytes(whole[: 3 * (len(whole) // 5)])
    good, bad = split(webdataset_tars.read(tmp_path / "a"))
    assert 1 <= len(good) <= 3 and kinds(bad) == {"malformed tar": 1} and "what follows is not read" in bad[0].reason
    assert all(probe_header(r.path)[1] == "" for r in good)
    (tmp_path / "a" / "0.tar").write_bytes(b"no tar at all" * 100)
    assert corpora.discover(tmp_path / "a") == []
    write_tar(tmp_path / "b" / "0.tar", [(f"{i}.wav", b"x") for i in range(200)])
    held_out = Counter(r.split for r in split(webdataset_tars.read(tmp_path / "b"))[0])
    assert held_out["train"] > 150 and held_out["validation"] and held_out["test"]  # nothing names a split: dealt by hash


def test_loose_sound_beside_tars_is_read_too(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.wav", encoded())])
    sound(tmp_path / "loose.wav")
    write_tar(tmp_path / "more" / "0.tar", [("b.wav", encoded())])
    sound(tmp_path / "more" / "inner.wav")
    write_tar(tmp_path / "validation" / "0.tar", [("c.wav", encoded())])
    sources = corpora.discover(tmp_path)
    assert sources == [("webdataset", tmp_path), ("webdataset", tmp_path / "more"), ("folder", tmp_path)]
    good = [r for source in sources for r in split(corpora.read(*source))[0]]
    assert sorted(Path(r.path.partition("#")[0]).relative_to(tmp_path).as_posix() for r in good) == [
        "0.tar",
        "loose.wav",
        "more/0.tar",
        "more/inner.wav",
        "validation/0.tar",
    ]


# ---------------------------------------------------------------------------------------------- Hugging Face data sets


FEATURES = {
    "audio": {"sampling_rate": RATE, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["Dog", "Rain"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}, "_type": "Sequence"},
}


def hf_table(count: int, noted: bool = True) -> pa.Table:
    """Rows as `datasets` stores them; the last but one has the name of a file instead of bytes, the last one nothing."""
    audio = [{"bytes": encoded(0.5 + 0.1 * i, 0.1 + 0.01 * i), "path": f"{i}.flac"} for i in range(count - 2)]
    audio += [{"bytes": None, "path": "beside.wav"}, None]
    table = pa.table(
        {
            "audio": pa.array(audio, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": [f"caption {i}" for i in range(count)],
            "label": [i % 3 for i in range(count)],  # there are two classes
            "tags": [[0, 1]] * count,
        }
    )
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}) if noted else table


def write_arrow(path: Path, table: pa.Table, stream: bool = True, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    open_writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with open_writer(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=3):
            writer.write_batch(batch)


@pytest.mark.parametrize("kind", ["stream", "file", "parquet", "parquet of one group"])
def test_hugging_face_data_sets(tmp_path, kind):
    root, table = tmp_path / "set", hf_table(8)
    (root / "train").mkdir(parents=True)
    sound(root / "beside.wav", 2.0, 0.4)
    if kind.startswith("parquet"):
        pq.write_table(table, root / "train" / "part.parquet", row_group_size=3 if kind == "parquet" else 100)
        pq.write_table(table.slice(0, 1), root / "test-00000-of-00001.parquet")
    else:
        write_arrow(root / "train" / "data-00000-of-00001.arrow", table, stream=kind == "stream")
        write_arrow(root / "test" / "data-00000-of-00001.arrow", table.slice(0, 1), stream=kind == "stream")
        (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    sources = corpora.discover(tmp_path)
    assert sources[0] == ("hf_datasets", root)
    good, bad = split(corpora.read(*sources[0]))
    train = [r for r in good if r.split == "train"]
    assert len(train) == 7 and Counter(r.split for r in good)["test"] == 1 and len({r.recording_id for r in good}) == 8
    assert [r.captions for r in train] == [(f"caption {i}",) for i in range(7)]
    assert train[0].labels == ("Dog", "a", "b") and train[1].labels == ("Rain", "a", "b") and train[2].labels == ("a", "b")
    assert kinds(bad) == {"missing file": 1} and train[6].path == str(root / "beside.wav")
    for i, recording in enumerate(train[:6]):
        assert probe_header(recording.path) == (pytest.approx(0.5 + 0.1 * i), "")
        assert np.abs(load_audio(recording.path, RATE) - tone(0.5 + 0.1 * i, 0.1 + 0.01 * i)).max() < 1e-4
    counts = ingest([root], tmp_path / "store", AUDIO, workers=0).corpora[0]
    assert counts.recordings == 7 and counts.rejected == {"held out": 1, "missing file": 1}  # the test shard repeats the first row


def test_hugging_face_shards_that_cannot_be_read(tmp_path):
    root = tmp_path / "set"
    write_arrow(root / "a.arrow", hf_table(4, noted=False))
    write_arrow(root / "compressed.arrow", hf_table(5), compression="zstd")
    pq.write_table(pa.table({"text": ["no sound"]}), root / "words.parquet")
    whole = (root / "a.arrow").read_bytes()
    (root / "b.arrow").write_bytes(whole[: len(whole) - len(whole) // 3])
    (root / "c.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert corpora.known(root) == ["hf_datasets"]
    good, bad = split(hf_datasets.read(root))
    assert [r.labels for r in good if "_a_" in r.recording_id] == [(), ()]  # nothing says what the numbers mean
    assert kinds(bad)["malformed shard"] >= 5, [r.reason for r in bad]
    assert any("compressed" in r.reason for r in bad) and any("no column of sounds" in r.reason for r in bad)
    assert (tmp_path / "other").mkdir() is None and corpora.known(tmp_path / "other") == []


# ---------------------------------------------------------------------------------------------------------- damage


def test_csv_records_lose_one_line_to_a_bad_quote(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\n1,"two\nlines"\n\n2,"never ends\n3,x\n4,"y"\n5,\xe9\n6,one,more\n7,"a ""b"""\r\n')
    records = list(csv_records(path))
    assert [r for r in records if not isinstance(r, BadLine)] == [
        (1, ["a", "b"]),
        (2, ["1", "two\nlines"]),
        (6, ["3", "x"]),
        (7, ["4", "y"]),
        (10, ["7", 'a "b"']),
    ]
    assert [r.number for r in records if isinstance(r, BadLine)] == [5, 8, 9]
    assert (8, ["5", "é"]) in list(csv_records(path, fallback="latin-1"))


def test_damaged_metadata_never_stops_a_reader(tmp_path):
    """Random bytes changed, cut out or repeated: rows are lost, the reader is not."""
    make_vggsound(tmp_path / "vggsound")
    make_fma(tmp_path / "fma")
    make_clotho(tmp_path / "clotho")
    write_tar(tmp_path / "webdataset" / "0.tar", [(f"{i}.{kind}", b'{"caption": "x"}') for i in range(8) for kind in ("json", "wav")])
    write_arrow(tmp_path / "hf_datasets" / "0.arrow", hf_table(6))
    pq.write_table(hf_table(6), tmp_path / "hf_datasets" / "1.parquet", row_group_size=2)
    generator = random.Random(0)
    for corpus, names in {
        "vggsound": ["vggsound.csv"],
        "fma": ["fma_metadata/tracks.csv", "fma_metadata/genres.csv"],
        "clotho": ["clotho_captions_evaluation.csv", "clotho_metadata_evaluation.csv"],
        "webdataset": ["0.tar"],
        "hf_datasets": ["0.arrow", "1.parquet"],
    }.items():
        originals = {name: (tmp_path / corpus / name).read_bytes() for name in names}
        for _ in range(12):
            for name, original in originals.items():
                data = bytearray(original)
                for _ in range(generator.randint(1, 8)):
                    at = generator.randrange(len(data))
                    edit = generator.randrange(3)
                    if edit == 0:
                        data[at] = generator.randrange(256)
                    elif edit == 1:
                        del data[at : at + generator.randint(1, 40)]
                    else:
                        data[at:at] = data[at : at + generator.randint(1, 40)]
                (tmp_path / corpus / name).write_bytes(data)
            records = list(corpora.read(corpus, tmp_path / corpus))
            assert records and all(isinstance(r, Recording | Rejected) and repr(r).encode("utf-8") for r in records), corpus


def test_the_worked_example_of_the_docs_is_a_reader(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parent.parent / "docs" / "corpora.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    reader = types.ModuleType("esc50")
    exec(compile(code, "docs/corpora.md", "exec"), reader.__dict__)
    (tmp_path / "esc" / "meta").mkdir(parents=True)
    (tmp_path / "esc" / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n1-1-A-0.wav,1,0,dog,True,1,A\n1-2-A-0.wav,1,0,sea_waves,True,2,A\nx,1\n"
    )
    sound(tmp_path / "esc" / "audio" / "1-1-A-0.wav")
    monkeypatch.setitem(corpora.READERS, "esc50", reader)
    monkeypatch.setattr(corpora, "PUBLISHED", [*corpora.PUBLISHED, "esc50"])
    assert corpora.discover(tmp_path) == [("esc50", tmp_path / "esc")]
    good, bad = split(corpora.read("esc50", tmp_path / "esc"))
    assert [(r.recording_id, r.labels, r.origin) for r in good] == [("1-1-A-0", ("Dog",), "freesound:1")]
    assert kinds(bad) == {"missing file": 1, "malformed line": 1}
    assert corpora.coverage("esc50", len(good), kinds(bad)) == "esc50: 1 found, 1 missing, 1 broken of 2,000 published"


def test_the_page_lists_every_reader_with_its_published_count():
    page = (Path(__file__).resolve().parent.parent / "docs" / "corpora.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d,]*) ?\|$", page, re.MULTILINE))
    published = {name: sum(getattr(reader, "PUBLISHED_COUNTS", {}).values()) for name, reader in corpora.READERS.items()}
    assert rows == {name: f"{count:,}" if count else "" for name, count in published.items()}
