"""The feature store: what is written is read, interrupted work does not exist, and nothing is mixed unnoticed."""

import json
import pickle
import re
import subprocess
import sys
import tarfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tiny_store
import webdataset

from pipelines.features.shards import LedgerRow, Rejection, completing_command
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore, StoreWarning
from stages.audio import AudioConfig, encode_flac
from stages.errors import UserError

REPO = Path(__file__).resolve().parent.parent
AUDIO = AudioConfig(clip_seconds=0.5)
RECIPE = {"format": 1, "weights": {"vae": "abc"}, "pooling": 8, "provenance": {"code": "one"}}


def clip_table(count: int) -> pa.Table:
    rows = [
        {
            "clip_id": f"corpus-{i:03d}",
            "corpus": "corpus",
            "path": f"/sounds/{i}.wav",
            "start": 0.5 * i,
            "seconds": 0.5,
            "captions": [f"sound {i}", "noise"],
            "transcript": "",
            "labels": [],
            "split": "train",
            "licence": "CC0",
        }
        for i in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)


def make_store(root: str | Path, count: int = 10, **settings: int) -> FeatureStore:
    return FeatureStore.create(root, AUDIO, clip_table(count), REJECTED_SCHEMA.empty_table(), **{"shard_size": 4, **settings})


def features(clip_id: str) -> dict[str, np.ndarray]:
    """Some arrays that differ from clip to clip, in shape too."""
    number = int(clip_id.rpartition("-")[2])
    rng = np.random.default_rng(number)
    return {
        "t5.npy": rng.normal(size=(2, 1 + number % 3, 4)).astype(np.float16),
        "t5_length.npy": np.array([1, number % 3], np.int16),
        "wide.npy": np.asfortranarray(rng.normal(size=(3, 5))),
    }


def fill(store: FeatureStore, series: str, without: tuple[str, ...] = (), shards: range | None = None) -> None:
    store.begin_series(series, RECIPE)
    for shard in shards or range(store.num_shards):
        ids = [row["clip_id"] for row in store.shard_rows(shard)]
        store.write_shard(
            series, shard, [(i, features(i)) for i in ids if i not in without], [Rejection(i, "bad") for i in ids if i in without]
        )


@pytest.fixture(params=["folder", "file", "memory"])
def root(request, tmp_path):
    """A place for a store: a plain folder, a file URL, and a filesystem that is not local."""
    yield {"folder": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{uuid.uuid4().hex}"}[request.param]


def test_round_trip_on_any_filesystem(root):
    fill(make_store(root), "text")
    store = FeatureStore.open(root)
    reader = pickle.loads(pickle.dumps(store.reader(["text"])))
    assert reader.clip_ids == store.clips()["clip_id"].tolist() and len(reader) == 10
    for clip_id in reversed(reader.clip_ids):
        for name, array in features(clip_id).items():
            read = reader.read(clip_id)[name.removesuffix(".npy")]
            assert read.dtype == array.dtype and np.array_equal(read, array) and read.flags.writeable
    assert FeatureStore.open(store.root).audio == AUDIO and store.verify("text") == [] and store.missing_shards("text") == []
    with pytest.raises(KeyError, match="corpus-999"):
        reader.read("corpus-999")


def test_waveforms_are_decoded(tmp_path):
    store = make_store(tmp_path, 1)
    wave = np.sin(np.arange(AUDIO.clip_samples, dtype=np.float32)) / 2
    store.begin_series("waveform", RECIPE)
    store.write_shard("waveform", 0, [("corpus-000", {"waveform.flac": encode_flac(wave, AUDIO.sample_rate)})])
    read = store.reader(["waveform"]).read("corpus-000")["waveform"]
    assert read.dtype == np.float32 and np.abs(read - wave).max() <= 2**-16


def test_clips_are_dealt_by_the_seed_alone(tmp_path):
    one = make_store(tmp_path / "a", 50, seed=3)
    table = clip_table(50)
    FeatureStore.create(tmp_path / "b", AUDIO, table.take(np.arange(50)[::-1]), REJECTED_SCHEMA.empty_table(), seed=3, shard_size=4)
    assert (tmp_path / "a/clips.parquet").read_bytes() == (tmp_path / "b/clips.parquet").read_bytes()
    order = one.clips()["clip_id"].tolist()
    assert sorted(order) == table["clip_id"].to_pylist() != order
    assert make_store(tmp_path / "c", 50, seed=4).clips()["clip_id"].tolist() != order
    dealt = [row for shard in range(one.num_shards) for row in one.shard_rows(shard)]
    assert [row["clip_id"] for row in dealt] == order
    assert [(row["shard"], row["position"]) for row in dealt] == [(i // 4, i % 4) for i in range(50)]
    assert [one.shard_count(shard) for shard in (0, 12)] == [4, 2] and dealt[0]["captions"][1] == "noise"


def test_creating_again_keeps_the_series_and_refuses_other_clips(tmp_path):
    fill(make_store(tmp_path), "text")
    assert make_store(tmp_path).missing_shards("text") == []
    with pytest.raises(UserError, match="num_clips: was 10, now 11"):
        make_store(tmp_path, 11)
    with pytest.raises(UserError, match="seed: was 0, now 1"):
        make_store(tmp_path, seed=1)


@pytest.mark.parametrize("clip_id", ["a.b", "a/b", "", "a b"])
def test_ids_that_cannot_name_members_are_refused(tmp_path, clip_id):
    row = clip_table(1).to_pylist()[0] | {"clip_id": clip_id}
    with pytest.raises(ValueError, match="no clip id"):
        FeatureStore.create(tmp_path, AUDIO, pa.Table.from_pylist([row], schema=CLIP_SCHEMA), REJECTED_SCHEMA.empty_table())


def test_shards_are_reproducible_and_plain_webdataset(tmp_path):
    stores = [make_store(tmp_path / name) for name in "ab"]
    for store in stores:
        fill(store, "text", without=("corpus-003",))
    for path in sorted((tmp_path / "a/text").iterdir()):
        assert path.read_bytes() == (tmp_path / "b/text" / path.name).read_bytes()
    with tarfile.open(tmp_path / "a/text/000000.tar") as tar:
        assert {(member.mtime, member.uname, member.uid, member.mode) for member in tar} == {(0, "", 0, 0o444)}
    urls = [str(tmp_path / f"a/text/{shard:06d}.tar") for shard in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [i for i in stores[0].clips()["clip_id"] if i != "corpus-003"]
    for sample in samples:
        for name, array in features(sample["__key__"]).items():
            assert np.array_equal(sample[name], array)


def test_snippet_of_the_page_reads_a_series_without_loa(tmp_path):
    """As printed in docs/store.md, on a store of a single shard."""
    tiny_store.make_store(tmp_path / "outputs", tiny_store.small(), clips=3, shard_size=8)
    snippets = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "store.md").read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [text for text in snippets if "webdataset" in text]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split(" ", 1)[0] for line in done.stdout.splitlines()) == ["made-000", "made-001", "made-002"]


def test_long_ids_keep_their_place(tmp_path):
    clips = clip_table(3)
    ids = pa.array([f"{'long' * 40}-{i:03d}" for i in range(3)])
    store = FeatureStore.create(tmp_path, AUDIO, clips.set_column(0, "clip_id", ids), REJECTED_SCHEMA.empty_table())
    fill(store, "text")
    reader = store.reader(["text"])
    assert all(np.array_equal(reader.read(i)["t5"], features(i)["t5.npy"]) for i in ids.to_pylist())


def test_a_reader_joins_series_and_refuses_incomplete_ones(tmp_path):
    store = make_store(tmp_path)
    fill(store, "text", without=("corpus-003", "corpus-004"))
    store.begin_series("loa-8", RECIPE)
    for shard in range(2):
        ids = [row["clip_id"] for row in store.shard_rows(shard) if row["clip_id"] != "corpus-005"]
        store.write_shard("loa-8", shard, [(i, {"loa.npy": np.zeros(2, np.float16)}) for i in ids])
    with pytest.raises(UserError, match=r"'loa-8' .* 2 of 3 shards exist; .*`loa preprocess loa --pooling 8`"):
        store.reader(["text", "loa-8"])
    assert store.missing_shards("loa-8") == [2]
    part = store.reader(["text", "loa-8"], shards=[0, 1])
    expected = [i for shard in range(2) for i in (row["clip_id"] for row in store.shard_rows(shard))]
    assert part.clip_ids == [i for i in expected if i not in ("corpus-003", "corpus-004", "corpus-005")]
    assert set(part.read(part.clip_ids[0])) == {"t5", "t5_length", "wide", "loa"} and "corpus-003" not in part
    fill(store, "other")
    with pytest.raises(UserError, match="both hold 't5'"):
        store.reader(["text", "other"])


def test_a_reader_serves_many_threads(tmp_path, monkeypatch, rounds):
    monkeypatch.setattr("pipelines.features.reader._MOST_OPEN_SHARDS", 2)
    store = make_store(tmp_path, 40)
    fill(store, "text")
    reader = store.reader(["text"])
    ids = np.random.default_rng(0).choice(reader.clip_ids, rounds(800, 100_000)).tolist()
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(reader.read, ids))
    assert all(np.array_equal(clip["wide"], features(i)["wide.npy"]) for i, clip in zip(ids, read, strict=True))


def test_a_recipe_is_compared_except_for_its_provenance(tmp_path):
    store = make_store(tmp_path)
    fill(store, "loa-8")
    store.begin_series("loa-8", RECIPE | {"provenance": {"code": "two"}})
    assert store.recipes()["loa-8"] == RECIPE
    with pytest.raises(UserError, match=r"weights\.vae: was abc, now def"):
        store.begin_series("loa-8", RECIPE | {"weights": {"vae": "def"}})
    fsspec.filesystem("file").rm(str(tmp_path / "loa-8"), recursive=True)
    store.begin_series("loa-8", RECIPE | {"pooling": 4})
    assert store.recipes()["loa-8"]["pooling"] == 4 and store.missing_shards("loa-8") == [0, 1, 2]


@pytest.mark.parametrize("damage", ["truncated", "gone", "ledger"])
def test_a_damaged_shard_counts_as_missing(tmp_path, damage):
    store = make_store(tmp_path)
    fill(store, "text")
    reader, tar = store.reader(["text"]), tmp_path / "text/000001.tar"
    if damage == "truncated":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "gone":
        tar.unlink()
    else:
        (tmp_path / "text/000001.json").write_text('{"shard": 1')
    with pytest.warns(StoreWarning, match="counts as missing"):
        assert store.missing_shards("text") == [1]
    with pytest.warns(StoreWarning), pytest.raises(UserError, match="2 of 3 shards"):
        store.reader(["text"])
    if damage != "ledger":
        with pytest.raises(UserError, match="recompute it with `loa preprocess text`"):
            reader.read(store.shard_rows(1)[0]["clip_id"])


def test_verify_finds_flipped_bits(tmp_path):
    store = make_store(tmp_path)
    fill(store, "text")
    tar = tmp_path / "text/000002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert store.missing_shards("text") == []
    with pytest.warns(StoreWarning, match="sha256"):
        assert store.verify("text") == [2]
    assert store.missing_shards("text") == [2]


def test_interrupted_writing_leaves_nothing(tmp_path):
    store = make_store(tmp_path)
    store.begin_series("text", RECIPE)
    clip_id = store.shard_rows(0)[0]["clip_id"]
    with pytest.raises(RuntimeError, match="interrupted"), store.shard_writer("text", 0) as writer:
        writer.add(clip_id, features(clip_id))
        raise RuntimeError("interrupted")
    assert list((tmp_path / "text").iterdir()) == []
    half = tmp_path / "text/000000.tar.draft-0123"
    half.write_bytes(b"half a shard")
    assert store.missing_shards("text") == [0, 1, 2]
    store.begin_series("text", RECIPE)
    assert not half.exists()


def test_every_clip_of_a_series_has_the_same_members(tmp_path):
    store = make_store(tmp_path)
    with pytest.raises(ValueError, match="corpus-001"), store.shard_writer("text", 0) as writer:
        writer.add("corpus-000", {"t5.npy": np.zeros(1)})
        writer.add("corpus-001", {"clap.npy": np.zeros(1)})


def test_pickled_objects_are_never_loaded(tmp_path):
    store = make_store(tmp_path, 1)
    with pytest.raises(ValueError, match="Object arrays"):
        store.write_shard("text", 0, [("corpus-000", {"t5.npy": np.array([{}], object)})])


def test_a_ledger_row_survives_json_and_nothing_else_does():
    row = LedgerRow(3, 1, 10, "ff", ("a",), (Rejection("b", "bad"),), ("mel.npy",), ((512, 7),))
    assert LedgerRow.from_json(row.to_json()) == row
    for other in (b"", b"{}", b"[]", json.dumps(json.loads(row.to_json()) | {"count": 2}).encode()):
        with pytest.raises(ValueError):
            LedgerRow.from_json(other)


def test_opening_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match="loa ingest"):
        FeatureStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99.*reads 1"):
        FeatureStore.open(tmp_path)


def test_every_series_knows_its_command():
    series = ("mel", "waveform", "loa-1", "latent", "text", "speech")
    assert [completing_command(name).removeprefix("loa preprocess ") for name in series] == [
        "mel",
        "mel",
        "loa --pooling 1",
        "latent",
        "text",
        "speech",
    ]
