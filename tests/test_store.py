"""The feature store: what is written is read, interrupted work does not exist, and nothing is mixed unnoticed."""

import functools
import json
import pickle
import re
import subprocess
import sys
import tarfile
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tiny_store
import webdataset

from pipelines.features import ledger as ledgers
from pipelines.features.ledger import Ledger, LedgerRow, Rejection, StoreWarning, journal_name, read_journal
from pipelines.features.shards import completing_command
from pipelines.features.store import FeatureStore
from pipelines.features.table import CLIP_SCHEMA, REJECTED_SCHEMA, WITHHELD, _gathered
from stages.audio import AudioConfig, encode_flac
from stages.errors import UserError
from stages.files import Place

REPO = Path(__file__).resolve().parent.parent
AUDIO = AudioConfig(clip_seconds=0.5)
RECIPE = {"format": 1, "weights": {"vae": "abc"}, "pooling": 8, "provenance": {"code": "one"}}


def clip_table(count: int, first: int = 0, **columns: object) -> pa.Table:
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
            **columns,
        }
        for i in range(first, first + count)
    ]
    return pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)


def make_store(root: str | Path, count: int = 10, **settings: int) -> FeatureStore:
    return FeatureStore.create(root, AUDIO, clip_table(count), REJECTED_SCHEMA.empty_table(), **{"shard_size": 4, **settings})


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and contents of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tar_of(store: FeatureStore, series: str, shard: int) -> Path:
    """Where a shard lies, on a local disk."""
    return store.series_folder(series).path / store.ledger(series)[shard].object


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


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def root(request, tmp_path, monkeypatch):
    """A place for a store: a plain folder, a file URL, and two filesystems that are not local."""
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    if request.param == "s3":
        return request.getfixturevalue("s3") + "/s"
    return {"folder": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{uuid.uuid4().hex}"}[request.param]


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
    number = reader.table.numbers(["corpus-007", "corpus-999"])
    assert np.array_equal(reader.read(number["corpus-007"])["wide"], features("corpus-007")["wide.npy"]) and len(number) == 1
    store.compact("text")
    assert read_journal(Place.of(store.root) / "text") == {} and store.missing_shards("text") == []
    assert np.array_equal(store.reader(["text"]).read("corpus-003")["wide"], features("corpus-003")["wide.npy"])
    with pytest.raises(KeyError):
        reader.read(10)


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
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    order = one.clips()["clip_id"].tolist()
    assert sorted(order) == table["clip_id"].to_pylist() != order
    assert make_store(tmp_path / "c", 50, seed=4).clips()["clip_id"].tolist() != order
    dealt = [row for shard in range(one.num_shards) for row in one.shard_rows(shard)]
    assert [row["clip_id"] for row in dealt] == order
    assert [(row["shard"], row["position"]) for row in dealt] == [(i // 4, i % 4) for i in range(50)]
    assert [one.shard_count(shard) for shard in (0, 12)] == [4, 2] and dealt[0]["captions"][1] == "noise"


def test_rows_are_gathered_in_any_order():
    rng = np.random.default_rng(0)
    schema = pa.schema([("a", pa.string()), ("b", pa.list_(pa.string()))])
    for count in (1, 2, 7, 100):
        rows = [{"a": f"x{i}", "b": [str(i)] * (i % 3)} for i in range(count)]
        table = pa.concat_tables([pa.Table.from_pylist(rows[first : first + 3], schema) for first in range(0, count, 3)])
        for wanted in (0, 1, count):
            places = rng.permutation(count)[:wanted]
            assert _gathered(table, places).to_pylist() == [rows[i] for i in places]


def test_creating_again_keeps_the_series_and_refuses_other_settings(tmp_path):
    fill(make_store(tmp_path), "text")
    before = files_of(tmp_path)
    assert make_store(tmp_path).missing_shards("text") == [] and files_of(tmp_path) == before
    with pytest.raises(UserError, match="seed: was 0, now 1"):
        make_store(tmp_path, seed=1)
    with pytest.raises(UserError, match="shard_size: was 4, now 5"):
        make_store(tmp_path, shard_size=5)
    assert files_of(tmp_path) == before


def test_clips_are_added_behind_those_that_exist(tmp_path):
    first = make_store(tmp_path, 10)
    fill(first, "text")
    old, order = files_of(tmp_path), first.clips()["clip_id"].tolist()
    grown = make_store(tmp_path, 17)  # names the ten again
    files = files_of(tmp_path)
    assert {name: files[name] for name in old} == old and grown.num_clips == 17 and grown.num_shards == 5
    assert grown.clips()["clip_id"].tolist()[:10] == order and sorted(grown.clips()["clip_id"]) == clip_table(17)["clip_id"].to_pylist()
    assert [grown.shard_count(shard) for shard in range(5)] == [4, 4, 2, 4, 3]
    assert [row["number"] for shard in range(5) for row in grown.shard_rows(shard)] == list(range(17))
    assert [grown.table.shard_of(clip) for clip in (0, 3, 4, 9, 10, 13, 14, 16)] == [0, 0, 1, 2, 3, 3, 4, 4]
    assert grown.missing_shards("text") == [3, 4] and grown.digest != first.digest
    with pytest.raises(UserError, match="3 of 5 shards exist"):
        grown.reader(["text"])
    fill(grown, "text", shards=range(3, 5))
    reader = grown.reader(["text"])
    assert len(reader) == 17 and all(np.array_equal(reader.read(i)["wide"], features(i)["wide.npy"]) for i in reader.clip_ids)
    again = make_store(tmp_path / "again", 10)
    assert make_store(tmp_path / "again", 17).clips().equals(grown.clips()) and again.digest == first.digest


def test_an_ingest_that_was_interrupted_is_done_again(tmp_path):
    make_store(tmp_path)
    (tmp_path / "parts/000000.json").unlink()
    with pytest.raises(UserError, match="interrupted; run `loa ingest`"):
        FeatureStore.open(tmp_path)
    assert make_store(tmp_path, 12, seed=7).num_clips == 12


def test_of_two_ingests_at_once_one_is_asked_to_run_again(tmp_path, monkeypatch):
    make_store(tmp_path, 8)
    first = FeatureStore.open
    stale = first(tmp_path)
    make_store(tmp_path, 9)
    monkeypatch.setattr(FeatureStore, "open", classmethod(lambda cls, root: stale))
    with pytest.raises(UserError, match="meanwhile; run this one again"):
        make_store(tmp_path, 11)
    monkeypatch.undo()
    assert make_store(tmp_path, 11).num_clips == 11


@pytest.mark.parametrize("twin", ["origin", "content"])
@pytest.mark.parametrize("held_out_first", [True, False])
def test_a_held_out_twin_leaves_training_whenever_it_comes(tmp_path, twin, held_out_first):
    def add(split: str) -> FeatureStore:
        first = 100 if split == "test" else 0
        table = pa.concat_tables([clip_table(1, first, split=split, **{twin: "youtube:x"}), clip_table(4, first + 1, split=split)])
        return FeatureStore.create(tmp_path, AUDIO, table, REJECTED_SCHEMA.empty_table(), shard_size=4)

    store = [add(split) for split in (("test", "train") if held_out_first else ("train", "test"))][-1]
    number = store.table.numbers(["corpus-000"])["corpus-000"]
    assert store.table.withdrawn.tolist() == [number] and store.table.row(number)["split"] == WITHHELD
    training, withheld = (np.flatnonzero(store.table.among("split", [split])) for split in ("train", WITHHELD))
    assert len(training) == 4 and number not in training and withheld.tolist() == [number]
    assert store.clips()["split"].value_counts().to_dict() == {"test": 5, "train": 4, WITHHELD: 1}
    assert store.table.among("split", ["test"]).sum() == 5 and store.table.values("split") == ["test", "train"]


def test_masks_say_what_the_rows_say(tmp_path):
    texts = [
        {"captions": ["x"], "labels": [], "transcript": ""},
        {"captions": [" "], "labels": [], "transcript": ""},
        {"captions": ["", "y"], "labels": [], "transcript": "z"},
        {"captions": [], "labels": ["dog"], "transcript": ""},
        {"captions": [], "labels": [], "transcript": "z"},
        {"captions": [], "labels": [], "transcript": ""},
    ]
    tables = [clip_table(1, i, **text, corpus="ab"[i % 2]) for i, text in enumerate(texts)]
    store = FeatureStore.create(tmp_path, AUDIO, pa.concat_tables(tables), REJECTED_SCHEMA.empty_table(), shard_size=2)
    order = [int(i.rpartition("-")[2]) for i in store.clips()["clip_id"]]
    expected = {("captions",): {0, 2}, ("labels",): {3}, ("transcript",): {2, 4}, ("captions", "labels"): {0, 2, 3}, (): set(range(6))}
    for kinds, clips in expected.items():
        assert {order[i] for i in np.flatnonzero(store.table.with_texts(kinds))} == clips
    assert {order[i] for i in np.flatnonzero(store.table.among("corpus", ["b", "c"]))} == {1, 3, 5}
    some = np.array([1, 3, 4])
    assert [row["captions"] for row in store.table.take(some, ["captions"])] == [texts[order[i]]["captions"] for i in some]


@pytest.mark.parametrize("clip_id", ["a.b", "a/b", "", "a b"])
def test_ids_that_cannot_name_members_are_refused(tmp_path, clip_id):
    row = clip_table(1).to_pylist()[0] | {"clip_id": clip_id}
    with pytest.raises(ValueError, match="no clip id"):
        FeatureStore.create(tmp_path, AUDIO, pa.Table.from_pylist([row], schema=CLIP_SCHEMA), REJECTED_SCHEMA.empty_table())


def test_shards_are_reproducible_and_plain_webdataset(tmp_path):
    stores = [make_store(tmp_path / name) for name in "ab"]
    for store in stores:
        fill(store, "text", without=("corpus-003",))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with tarfile.open(tar_of(stores[0], "text", 0)) as tar:
        assert {(member.mtime, member.uname, member.uid, member.mode) for member in tar} == {(0, "", 0, 0o444)}
    urls = sorted(map(str, (tmp_path / "a/text").glob("*.tar")))
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
    both = store.reader(["text", "other"])
    clip = both.clip_ids[0]
    assert set(both.read(clip, ["other"])) == set(both.read(clip, ["text"]))  # a step that needs one reads one
    with pytest.raises(UserError, match="text, other hold 't5'"):
        both.read(clip)


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


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "gone", "ledger"])
def test_a_damaged_shard_counts_as_missing_and_is_made_again(tmp_path, damage, compacted):
    store = make_store(tmp_path)
    fill(store, "text")
    if compacted and damage != "ledger":
        store.compact("text")
    reader, tar, before = store.reader(["text"]), tar_of(store, "text", 1), files_of(tmp_path)
    if damage == "truncated":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "gone":
        tar.unlink()
    else:
        (tmp_path / "text" / journal_name(1)).write_text('{"shard": 1')
    with pytest.warns(StoreWarning, match="counts as missing"):
        assert store.missing_shards("text") == [1]
    with pytest.warns(StoreWarning), pytest.raises(UserError, match="2 of 3 shards"):
        store.reader(["text"])
    if damage != "ledger":
        with pytest.raises(UserError, match="recompute it with `loa preprocess text`"):
            reader.read(store.shard_rows(1)[0]["clip_id"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        fill(store, "text", shards=range(1, 2))
    assert store.missing_shards("text") == []
    store.compact("text")
    assert {name: data for name, data in files_of(tmp_path).items() if name.endswith(".tar")} == {
        name: data for name, data in before.items() if name.endswith(".tar")
    }


@pytest.mark.parametrize("compacted", [False, True])
def test_verify_finds_flipped_bits(tmp_path, compacted):
    store = make_store(tmp_path)
    fill(store, "text")
    if compacted:
        store.compact("text")
    tar = tar_of(store, "text", 2)
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert store.missing_shards("text") == []
    with pytest.warns(StoreWarning, match="sha256"):
        assert store.verify("text") == [2]
    assert store.missing_shards("text") == [2]
    fill(store, "text", shards=range(2, 3))
    assert store.verify("text") == [] and store.missing_shards("text") == []


def test_a_flipped_bit_is_named_where_it_is_read(tmp_path):
    store = make_store(tmp_path)
    fill(store, "loa-8")
    row = store.shard_rows(2)[1]
    span = store.ledger("loa-8").find(2, row["number"])
    tar = tar_of(store, "loa-8", 2)
    data = bytearray(tar.read_bytes())
    data[span.offsets[0] + span.offsets[1] - 1] ^= 16
    tar.write_bytes(data)
    reader = store.reader(["loa-8"])
    said = rf"{row['clip_id']} of the series 'loa-8' is damaged.*shard 2.*`loa preprocess loa --pooling 8 --verify`"
    with pytest.raises(UserError, match=said):
        reader.read(row["number"])
    assert "wide" in reader.read(row["number"] - 1)  # its neighbour is whole


def test_of_two_who_make_a_shard_one_comes_first(tmp_path):
    store = make_store(tmp_path)
    store.begin_series("text", RECIPE)
    ids = [row["clip_id"] for row in store.shard_rows(0)]
    with store.shard_writer("text", 0) as late:
        first = store.write_shard("text", 0, [(i, {"t5.npy": np.zeros(1)}) for i in ids])
        for i in ids:
            late.add(i, {"t5.npy": np.ones(1)})
    assert late.row == first == store.ledger("text")[0]
    assert [path.name for path in (tmp_path / "text").glob("*.tar")] == [first.object]
    assert store.write_shard("text", 0, [(i, {"t5.npy": np.zeros(1)}) for i in ids]) == first


@pytest.mark.parametrize("compacted", [False, True])
def test_a_shard_is_remade_where_that_is_asked(tmp_path, compacted):
    store = make_store(tmp_path)
    fill(store, "text", without=("corpus-003", "corpus-004"))
    if compacted:
        store.compact("text")
    shard = next(shard for shard, row in store.ledger("text").items() if row.rejected)
    ids = [row["clip_id"] for row in store.shard_rows(shard)]
    with store.claim(["text"], shard, remake=True) as mine, store.shard_writer(*mine, shard, remake=True) as writer:
        for i in ids:
            writer.add(i, features(i))
    row = store.ledger("text")[shard]
    assert row == writer.row and row.count == len(ids) and not row.rejected and len(list((tmp_path / "text").glob("*.tar"))) == 3
    with store.shard_writer("text", shard, remake=True) as writer:
        for i in ids[1:]:
            writer.add(i, features(i))
        writer.reject(ids[0], "bad")
    assert store.ledger("text")[shard].rejected == (Rejection(ids[0], "bad"),)
    store.compact("text")
    assert store.ledger("text")[shard].rejected == (Rejection(ids[0], "bad"),) and store.missing_shards("text") == []


def test_a_recipe_is_not_replaced_while_another_job_works(tmp_path):
    store = make_store(tmp_path)
    with store.working() as other:
        other.begin_series("loa-8", RECIPE)
        with pytest.raises(UserError, match="pooling: was 8, now 4"):
            store.begin_series("loa-8", RECIPE | {"pooling": 4})
        other.begin_series("loa-8", RECIPE | {"pooling": 2})  # nothing of it exists yet
    store.begin_series("loa-8", RECIPE | {"pooling": 4})


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the code does in its wake counts, for the steps it replaces are storage."""


@pytest.mark.parametrize("also_drop", [False, True])
def test_a_compaction_may_be_killed_before_any_step(tmp_path, monkeypatch, also_drop):
    monkeypatch.setattr(ledgers, "SHARDS_PER_FILE", 2)
    store = make_store(tmp_path, 20)
    fill(store, "text", without=("corpus-003",), shards=range(3))
    store.compact("text")
    fill(store, "text", shards=range(3, 5))
    rows = dict(store.ledger("text"))
    drop = {1: rows[1].object} if also_drop else {}
    folder = store.series_folder("text")
    steps = {name: getattr(Place, name) for name in ("create", "remove", "write")}
    for allowed in range(100):
        left = iter(range(allowed))

        def step(place, *args, name, left=left):
            if next(left, None) is None:
                raise Killed
            return steps[name](place, *args)

        for name in steps:
            monkeypatch.setattr(Place, name, functools.partialmethod(step, name=name))
        try:
            ledgers.compact(folder, drop)
        except Killed:
            killed = True
        else:
            killed = False
        for name, method in steps.items():
            monkeypatch.setattr(Place, name, method)
        there = dict(Ledger(folder, ""))
        assert {shard: row for shard, row in there.items() if shard not in drop} == {s: r for s, r in rows.items() if s not in drop}
        if not killed:
            break
    assert allowed >= 5 and set(there) == set(rows) - set(drop)
    assert read_journal(folder) == {} and len((folder / "index").list()) == 3  # one file per two shards


def test_compactions_at_once_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, "SHARDS_PER_FILE", 4)
    store = make_store(tmp_path, 120)
    store.begin_series("text", RECIPE)

    def make(shard: int) -> None:
        fill(store, "text", shards=range(shard, shard + 1))  # compacts, too

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(store.num_shards)))
    store.compact("text")
    assert list(store.ledger("text")) == list(range(30)) and read_journal(store.series_folder("text")) == {}
    assert len(store.reader(["text"])) == 120


def test_a_listing_that_misses_an_edition_loses_nothing(tmp_path, monkeypatch):
    """Where others rename files meanwhile, a folder's listing may lack the newest one: the edition is made again."""
    store = make_store(tmp_path)
    store.begin_series("text", RECIPE)
    fill(store, "text")
    rows = dict(store.ledger("text"))
    store.discard("text", [0])
    fill(store, "text", shards=range(1))
    create, listing, missed = Place.create, Place.list, []

    def creates(place, data):
        made = create(place, data)
        if made and place.parent.name == "index" and not missed:
            missed.append(place.parent.url)
        return made

    def lists(place):
        if len(missed) == 1 and place.url == missed[0]:
            missed.append("")
            return {}
        return listing(place)

    monkeypatch.setattr(Place, "create", creates)
    monkeypatch.setattr(Place, "list", lists)
    store.compact("text")
    assert len(missed) == 2 and dict(store.ledger("text")) == rows and read_journal(store.series_folder("text")) == {}


def test_interrupted_writing_leaves_nothing(tmp_path):
    store = make_store(tmp_path)
    store.begin_series("text", RECIPE)
    clip_id = store.shard_rows(0)[0]["clip_id"]
    with pytest.raises(RuntimeError, match="interrupted"), store.shard_writer("text", 0) as writer:
        writer.add(clip_id, features(clip_id))
        raise RuntimeError("interrupted")
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["series.json"]
    half = tmp_path / "text/000000.tar.draft-0123"
    half.write_bytes(b"half a shard")
    with store.working() as other, other.shard_writer("text", 1) as writer:
        store.begin_series("text", RECIPE)  # leaves what a living job writes alone
        for row in store.shard_rows(1):
            writer.add(row["clip_id"], features(row["clip_id"]))
    assert not half.exists() and store.missing_shards("text") == [0, 2] and (tmp_path / "jobs").exists()
    half.write_bytes(b"half a shard")
    store.begin_series("text", RECIPE)
    assert not half.exists() and list((tmp_path / "jobs").iterdir()) == []


def test_jobs_share_the_shards_of_a_store(root):
    store = make_store(root)
    store.begin_series("text", RECIPE)
    with store.working() as one, store.working() as two:
        with one.claim(["text"], 0) as mine, two.claim(["text"], 0) as same, two.claim(["text"], 1) as other:
            assert (mine, same, other) == (("text",), (), ("text",))
            fill(one, "text", shards=range(1))
        with two.claim(["text"], 0) as done:
            assert done == ()  # it exists by now
        with one.claim(["text"], 2):
            store.begin_series("text", RECIPE)
            with two.claim(["text"], 2) as taken:
                assert taken == ()
    (Place.of(store.root) / "text/claims/000001").write(b"0123456789ab")  # of a job that was killed
    with store.working() as three, three.claim(["text"], 1) as left:
        assert left == ("text",)
    assert (Place.of(store.root) / "jobs").list() == {} and (Place.of(store.root) / "text/claims").list() == {}


def test_every_clip_of_a_series_has_the_same_members_and_its_turn(tmp_path):
    store = make_store(tmp_path)
    first, second, *_ = (row["clip_id"] for row in store.shard_rows(0))
    with pytest.raises(ValueError, match=second), store.shard_writer("text", 0) as writer:
        writer.add(first, {"t5.npy": np.zeros(1)})
        writer.add(second, {"clap.npy": np.zeros(1)})
    with pytest.raises(ValueError, match=f"{first} comes too late"), store.shard_writer("text", 0) as writer:
        writer.add(second, {"t5.npy": np.zeros(1)})
        writer.add(first, {"t5.npy": np.zeros(1)})
    with pytest.raises(ValueError, match=f"{first} is not in shard 1"), store.shard_writer("text", 1) as writer:
        writer.add(first, {"t5.npy": np.zeros(1)})


def test_pickled_objects_are_never_loaded(tmp_path):
    store = make_store(tmp_path, 1)
    with pytest.raises(ValueError, match="Object arrays"):
        store.write_shard("text", 0, [("corpus-000", {"t5.npy": np.array([{}], object)})])


def test_a_ledger_row_survives_json_and_nothing_else_does():
    row = LedgerRow(3, "000003-0123456789ab.tar", 10, "ff", ("mel.npy",), (7,), (512, 7), (99,), (Rejection("b", "bad"),))
    assert LedgerRow.from_json(row.to_json()) == row
    values = json.loads(row.to_json())
    changed = [{"clips": [7, 8]}, {"object": "../000003-0123456789ab.tar"}, {"object": "000004-0123456789ab.tar"}, {"spans": [1]}]
    for other in (b"", b"{}", b"[]", *(json.dumps(values | change).encode() for change in changed)):
        with pytest.raises(ValueError):
            LedgerRow.from_json(other)


def test_opening_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match="loa ingest"):
        FeatureStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99}')  # as 1 is: nothing is converted
    with pytest.raises(UserError, match="format 99.*reads 2"):
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
