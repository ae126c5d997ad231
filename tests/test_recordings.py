"""Recordings inside larger files and behind URLs: addresses, and what is fetched of them."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipelines.corpora.headers import probe_header
from pipelines.features.passes import read_recording
from stages.audio import load_audio, probe
from stages.errors import AudioError
from stages.recordings import Address, open_recording, parse_address, row_of, stretch_of

RATE = 16_000
TONE = (0.1 * np.sin(np.arange(RATE) * 0.1)).astype(np.float32)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, RATE, format=kind)
    return buffer.getvalue()


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


def test_addresses_are_taken_apart():
    assert parse_address("/a/b.wav") == Address("/a/b.wav") and parse_address("/a/b.wav").plain
    assert parse_address(stretch_of("s3://x/0.tar", 512, 88)) == Address("s3://x/0.tar", 512, 88)
    assert parse_address(row_of("/a/x.parquet", "my audio", 17)) == Address("/a/x.parquet", column="my audio", row=17)
    assert parse_address("/a/song #1.wav").plain and parse_address("/a#bytes=1-2.wav").plain
    assert not any(parse_address(path).plain for path in ("s3://x/a.wav", "/a.tar#bytes=1-2", "/a.parquet#column=a&row=1"))
    assert sorted([row_of("x", "a", 10), row_of("x", "a", 9)]) == [row_of("x", "a", 9), row_of("x", "a", 10)]


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_stretch_of_a_file_is_read_like_a_file(tmp_path, memory, kind, place):
    data, padding = encoded(kind), os.urandom(1000)
    holder = f"memory://box/{kind}.tar" if place == "memory" else str(tmp_path / "0.tar")
    with fsspec.open(holder, "wb") as stream:
        stream.write(padding + data + padding)
    address = stretch_of(holder, len(padding), len(data))
    with open_recording(address) as file:
        assert file.read() == data and file.seek(-10, io.SEEK_END) == len(data) - 10 and file.read() == data[-10:]
    assert probe(address).seconds == pytest.approx(1.0, abs=0.1) and probe_header(address)[1] == ""
    whole = load_audio(data, RATE)
    np.testing.assert_array_equal(load_audio(address, RATE), whole)
    np.testing.assert_array_equal(read_recording(address, RATE, 0.25, 0.5), load_audio(data, RATE, 0.25, 0.5))


def test_only_the_stretch_is_fetched(memory, monkeypatch):
    data = encoded("FLAC")
    with fsspec.open("memory://box/0.tar", "wb") as stream:
        stream.write(bytes(1 << 20) + data + bytes(1 << 20))
    fetched = []
    cat_file = type(memory).cat_file
    monkeypatch.setattr(
        type(memory), "cat_file", lambda fs, path, start=None, end=None: fetched.append((start, end)) or cat_file(fs, path, start, end)
    )
    read_recording(stretch_of("memory://box/0.tar", 1 << 20, len(data)), RATE, 0.0, 1.0)
    assert fetched == [(1 << 20, (1 << 20) + len(data))]


def test_what_is_wrong_with_an_address_is_said(tmp_path, memory):
    assert probe_header(stretch_of(str(tmp_path / "gone.tar"), 0, 9)) == (0.0, "missing file")
    assert probe_header(stretch_of("memory://box/gone.tar", 0, 9)) == (0.0, "missing file")
    assert probe_header("memory://box/gone.wav") == (0.0, "missing file")
    (tmp_path / "0.tar").write_bytes(b"no sound at all" * 9)
    seconds, problem = probe_header(stretch_of(str(tmp_path / "0.tar"), 3, 50))
    assert seconds == 0 and problem.startswith("unreadable: cannot be decoded")
    data = encoded("WAV")
    (tmp_path / "1.tar").write_bytes(data[: len(data) // 2])  # cut off behind the header
    assert 0.4 < len(load_audio(stretch_of(str(tmp_path / "1.tar"), 0, len(data)), RATE)) / RATE < 0.6
    with pytest.raises(FileNotFoundError):
        load_audio(stretch_of(str(tmp_path / "gone.tar"), 0, 9), RATE)


@pytest.mark.parametrize("nested", [True, False])
def test_rows_of_parquet_files(tmp_path, memory, nested):
    sounds = [encoded("FLAC") if i % 3 else None for i in range(10)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    table = pa.table({"sound": pa.array([{"bytes": s, "path": "x"} if nested else s for s in sounds], kind), "text": ["x"] * 10})
    for file in (str(tmp_path / "x.parquet"), "memory://box/x.parquet"):
        with fsspec.open(file, "wb") as stream:
            pq.write_table(table, stream, row_group_size=4)
        for i in (9, 1, 8):
            if sounds[i] is not None:
                with open_recording(row_of(file, "sound", i)) as opened:
                    assert opened.read() == sounds[i]
        assert probe_header(row_of(file, "sound", 4)) == (1.0, "")
        assert "holds no sound" in probe_header(row_of(file, "sound", 3))[1]
        with pytest.raises(AudioError, match="has 10 rows, so there is no row 10"):
            open_recording(row_of(file, "sound", 10))


def test_rows_in_order_decompress_each_group_once(tmp_path, monkeypatch):
    """Also when threads read them, as for headers: a row alone would cost its whole row group each time.

    A thread that the others have left behind may ask for a group again.
    """
    file = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"audio": pa.array([encoded("FLAC")] * 40, pa.binary())}), file, row_group_size=10)
    groups = []
    read_row_group = pq.ParquetFile.read_row_group

    def noted(parquet, group, **options):
        groups.append(group)
        return read_row_group(parquet, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    with ThreadPoolExecutor(4) as threads:
        headers = list(threads.map(probe_header, sorted(row_of(file, "audio", i) for i in range(40))))
    assert headers == [(1.0, "")] * 40 and set(groups) == {0, 1, 2, 3} and len(groups) <= 8
