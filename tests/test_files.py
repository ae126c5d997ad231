"""Places: the same on a disk, in memory and on an object store; whole or not at all; never a folder named like a scheme."""

import os
import pickle
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.files import Place
from stages.recordings import open_recording


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request, tmp_path) -> Place:
    if request.param == "s3":
        return Place.of(request.getfixturevalue("s3")) / "project"
    return Place.of(tmp_path / "project" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/project")


def test_a_file_is_written_read_listed_and_removed(folder):
    place = folder / "a/b.json"
    assert not place.exists() and folder.list() == {} and list(folder.folders()) == []
    with pytest.raises(FileNotFoundError):
        place.read()
    with pytest.raises(FileNotFoundError):
        place.size()
    place.write(b"0123456789")
    (folder / "top").write(b"x")
    assert place.exists() and place.parent.exists() and place.size() == 10
    assert (place.read(), place.read_range(2, 5), place.read_range(8, 99)) == (b"0123456789", b"234", b"89")
    with place.open() as file:
        assert file.read(3) == b"012"
    assert folder.list() == {"top": 1} and list(folder.folders()) == ["a"] and place.parent.list() == {"b.json": 10}
    assert folder.tree() == {"a/b.json": 10, "top": 1}
    place.write(b"new")
    assert pickle.loads(pickle.dumps(place)).read() == b"new"
    place.remove()
    place.remove()
    assert not place.exists()
    (folder / "a/deep/er").write(b"1")
    (folder / "a").remove_tree()
    (folder / "a").remove_tree()
    assert folder.tree() == {"top": 1}


def test_of_many_writers_one_creates(folder):
    place = folder / "journal/000001.json"
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda i: place.create(b"%d" % i), range(8 if "memory" not in str(folder) else 1)))
    assert sum(won) == 1 and place.read() == b"%d" % won.index(True)
    assert place.create(b"late") is False and place.read() != b"late"
    assert place.parent.list() == {"000001.json": 1}  # no drafts


def test_a_draft_that_fails_leaves_the_old_file(folder):
    place = folder / "weights.bin"
    with place.writing(".npz") as draft:
        draft.write_bytes(b"first")
        assert draft.suffix == ".npz"
    with pytest.raises(RuntimeError), place.writing() as draft:
        draft.write_bytes(b"half")
        raise RuntimeError
    assert place.read() == b"first" and folder.tree() == {"weights.bin": 5}


def test_folders_travel_whole(folder, tmp_path):
    source = tmp_path / "stage"
    (source / "unet").mkdir(parents=True)
    (source / "unet/weights").write_bytes(b"w1")
    (source / "stage.json").write_bytes(b"{}")
    place = folder / "stage"
    place.upload(source, last=["stage.json"])
    copy = place.local_copy(tmp_path / "cache")
    assert (copy / "unet/weights").read_bytes() == b"w1" and copy.name == "stage" and place.local_copy(tmp_path / "cache") == copy
    (source / "unet/weights").unlink()
    (source / "unet/other").write_bytes(b"w2")
    place.upload(source, last=["stage.json"])
    assert place.tree() == {"stage.json": 2, "unet/other": 2}
    copy = place.local_copy(tmp_path / "cache")
    assert sorted(p.name for p in copy.rglob("*")) == ["other", "stage.json", "unet"]
    assert (place / "stage.json").local_copy(tmp_path / "cache").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").local_copy(tmp_path / "cache")


def test_filesystems_without_hard_links_create_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    place = Place.of(tmp_path / "row")
    assert place.create(b"one") and not place.create(b"two") and place.read() == b"one" and Place.of(tmp_path).list() == {"row": 3}


@pytest.mark.parametrize("where", ["s3://bucket/x/", Path("s3://bucket/x"), "S3://bucket/x"])
def test_a_url_never_becomes_a_folder(where, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.chdir(tmp_path)
    place = Place.of(where)
    assert str(place) == "s3://bucket/x" and not place.local and place.name == "x"
    assert (str(place / "y/z"), str(place.parent), str(place.parent.parent)) == ("s3://bucket/x/y/z", "s3://bucket", "s3://bucket")
    with pytest.raises(UserError, match="MLflow's database needs a local folder"):
        place.local_path("MLflow's database")
    assert list(tmp_path.iterdir()) == []


def test_local_paths_are_absolute_and_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {Place.of(where) for where in ("a", Path("a"), tmp_path / "a", f"file://{tmp_path}/a", Place.of("a"), "b/../a/")}
    assert places == {Place(str(tmp_path / "a"))}
    (place,) = places
    assert place.path == tmp_path / "a" and place.parent.path == tmp_path and place.name == "a"
    for name in ("", "../x", "/x", "a//b"):
        with pytest.raises(ValueError, match="names nothing"):
            place / name


def test_what_nothing_reads_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"nosuch:// is no scheme"):
        Place.of("nosuch://x/y")
    with pytest.raises(UserError, match="is no URL"):
        Place.of("://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"pip install 'loa\[s3\]'"):
        Place.of("s3://bucket/x")


def test_a_store_that_does_not_answer_is_an_oserror(s3_server, monkeypatch):
    """Whatever its library raises (botocore's errors are none): a pass then takes it for the world's fault, not the recording's."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    there = Place.of("s3://bucket/clip.wav")
    try:
        for request in (there.read, there.size, there.open, there.list, lambda: there.write(b"x"), lambda: there.create(b"x")):
            with pytest.raises(OSError, match="s3://bucket/clip.wav|127.0.0.1:9"):
                request()
        for address in ("s3://bucket/clip.wav", "s3://bucket/all.tar#bytes=512-100"):
            with pytest.raises(OSError, match="127.0.0.1:9"):
                open_recording(address).read()
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
