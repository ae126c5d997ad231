"""The work folder behind a URL: an emulated S3 takes a project from recordings to sound, and no local folder called s3: appears."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundle import AUDIO, write_stages
from tiny_store import KINDS, run_here, small, sound

import loa
from friendly import plain_sentence
from pipelines.evaluation.records import read_records
from pipelines.export import export
from pipelines.features.store import FeatureStore
from pipelines.train import train_stage
from pipelines.weights import released_folders
from stages.audio import write_wav
from stages.base import read_card
from stages.bundle import LAST, assemble, read_info
from stages.errors import UserError
from stages.files import Place


def run(*words: str) -> str:
    done = CliRunner().invoke(loa.main, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words: str) -> str:
    done = CliRunner().invoke(loa.main, list(words), catch_exceptions=False)
    assert done.exit_code != 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with a cache of its own; at the end nobody has made a local folder of a URL."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "LOA_WORK", "LOA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    assert [path.name for path in folder.iterdir() if path.name not in ("outputs",)] == []
    assert [path for path in tmp_path.rglob("s3*") if path.is_dir()] == []


def recordings(folder: Path, count: int = 9) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        write_wav(folder / f"{KINDS[i % 3]}{i}.wav", sound(KINDS[i % 3], rng, small().audio), small().audio.sample_rate)
    return folder


def test_a_project_behind_a_url(s3: str, tmp_path: Path) -> None:
    """The passes in this process: that Ray's workers reach an object store is a test of the store."""
    work, uri, variant = f"{s3}/project", f"sqlite:///{tmp_path}/mlflow.db", small()
    run("ingest", str(recordings(tmp_path / "sounds")), "--work", work, "--tiny", "--workers", "0", "--shard-size", "4")
    store = FeatureStore.open(f"{work}/store")
    run_here("mel", store, variant)
    assert store.root == f"{work}/store" and len(store.reader(["mel", "waveform"])) == 9

    sizes = {"steps": 2, "global_batch": 2, "validate_every": 2}
    quick = [word for name, value in sizes.items() for word in ("--set", f"recipes.audiomae.{name}={value}")]
    train = ["train", "audiomae", "--work", work, "--tiny", *quick, "--workers", "0", "--tracking-uri", uri]
    assert f"released to {work}/stages/audiomae" in run(*train)
    assert "finished already" in run(*train)
    assert read_card(f"{work}/stages/audiomae", "audiomae")["steps"] == 2

    run_here("loa", store, variant, released_folders(work, {}))
    loa_series = store.reader(["loa-1"])
    assert len(loa_series) == 9 and np.isfinite(loa_series.read(loa_series.clip_ids[0])["loa"]).all()

    run("report", "--work", work, "--tracking-uri", uri)
    assert b"audiomae" in (Place.of(work) / "report.html").read()
    assert set(Place.of(work).folders()) == {"store", "stages", "runs"}


def test_two_steps_and_an_earlier_stage_behind_a_url(s3: str, tmp_path: Path) -> None:
    """Without Ray: what training writes, checkpoints beside the rest."""
    from tiny_store import make_store

    variant = small(steps=2)
    make_store(tmp_path / "local", variant)
    work = Place.of(f"{s3}/w")
    card = train_stage("audiomae", variant, work, store=str(tmp_path / "local" / "store"), workers=0)
    assert card == work / "stages" / "audiomae"
    assert list(released_folders(work, {})) == ["audiomae"]
    assert "step_00000002/COMMIT" in (work / "runs" / "audiomae").tree()
    (card / "stage.json").remove()  # as an upload leaves it that was broken off
    assert released_folders(work, {}) == {}
    train_stage("audiomae", variant, work, store=str(tmp_path / "local" / "store"), workers=0)
    assert list(released_folders(work, {})) == ["audiomae"]


def test_a_bundle_behind_a_url(s3: str, tmp_path: Path, elsewhere: Path) -> None:
    stages = write_stages(tmp_path / "made")
    for name, folder in stages.items():
        (folder / "stage.json").write_text(f'{{"format": 1, "stage": "{name}"}}')
        Place.of(f"{s3}/w/stages/{name}").upload(folder, ["stage.json"])
    (elsewhere / "outputs").mkdir()
    bundle = Place.of(f"{s3}/w/bundle")
    meta = {"variant": "audioldm2-full", "tiny": True, "audio": AUDIO}
    copies = {name: folder.local_copy() for name, folder in released_folders(f"{s3}/w", {}).items()}
    assemble(copies, bundle, meta)
    assert read_info(bundle).tiny
    run("generate", "rain", "--bundle", str(bundle), "--steps", "1", "--seconds", "0.64", "-o", "outputs/rain.wav")
    assert (elsewhere / "outputs" / "rain.wav").stat().st_size > 10_000

    assemble(copies, bundle, meta)  # the same again is no conflict
    with pytest.raises(UserError, match="holds another bundle"):
        assemble(copies, bundle, meta | {"variant": "audioldm2-msd"})
    assemble(copies, bundle, meta | {"variant": "audioldm2-msd"}, force=True)
    assert read_info(bundle).variant.startswith("audioldm2-msd"), "the copy of the old bundle was read"

    (bundle / LAST[-1]).remove()  # an upload that was broken off
    assert "no whole bundle" in refused("generate", "rain", "--bundle", str(bundle), "-o", "outputs/x.wav")
    assemble(copies, bundle, meta)
    assert read_info(bundle).variant.startswith("audioldm2-full")
    (Place.of(f"{s3}/w/other") / "notes.txt").write(b"mine")
    with pytest.raises(UserError, match="is not a bundle"):
        assemble(copies, Place.of(f"{s3}/w/other"), meta)


def test_export_brings_the_card_last(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload dies in the middle: what is there is not taken for a bundle, and the next export makes it whole."""
    stages = write_stages(tmp_path / "made")
    given = {name: str(folder) for name, folder in stages.items()}
    given["audiomae"] = str(_audiomae(tmp_path))
    variant = _variant_of_audio()
    upload, sent = Place.upload, []

    def dies(self: Place, source: Path, last: object = ()) -> None:
        if not source.is_dir():
            sent.append(self.name)
            if len(sent) == 5:
                raise OSError("connection lost")
        upload(self, source, last)  # type: ignore[arg-type]

    monkeypatch.setattr(Place, "upload", dies)
    with pytest.raises(OSError, match="connection lost"):
        export(f"{s3}/w", variant, given=given)
    with pytest.raises(UserError, match="no whole bundle"):
        read_info(f"{s3}/w/bundle")
    assert export(f"{s3}/w", variant, given=given) == Place.of(f"{s3}/w/bundle")
    assert tuple(sent[-2:]) == LAST
    assert read_info(f"{s3}/w/bundle").variant == variant.name
    assert not any((tmp_path / "cache" / "drafts").rglob("*.safetensors"))


def _audiomae(tmp_path: Path) -> Path:
    from stages.audiomae.model import AudioMAE
    from stages.checkpoints import save_network

    config = small().audiomae
    save_network(AudioMAE(config), config, tmp_path / "audiomae")
    return tmp_path / "audiomae"


def _variant_of_audio():  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(small(), audio=AUDIO)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("words", [["train", "vae", "--tiny"], ["export"], ["evaluate"], ["report"]])
def test_mlflow_asks_for_a_server_before_any_work(words: list[str], s3: str) -> None:
    sentence = refused(*words, "--work", f"{s3}/w")
    assert "mlflow server" in sentence and "MLFLOW_TRACKING_URI" in sentence
    assert Place.of(f"{s3}/w").tree() == {}


def test_the_demo_stays_on_a_disk(s3: str) -> None:
    assert "the demo needs a local folder" in refused("demo", "--work", f"{s3}/w")


def test_a_scheme_that_nothing_reads() -> None:
    assert "no scheme that fsspec knows" in refused("ingest", "sounds", "--work", "nosuch://bucket/x")


def test_records_of_a_project_behind_a_url(s3: str) -> None:
    with pytest.raises(UserError, match="there is nothing at"):
        read_records(f"{s3}/w")


# ----------------------------------------------------------------------------------------------------- the way there


def test_writing_folder(s3: str, tmp_path: Path) -> None:
    place = Place.of(f"{s3}/w/folder")
    with pytest.raises(RuntimeError), place.writing_folder() as folder:
        folder.mkdir(parents=True)
        (folder / "half").write_text("1")
        raise RuntimeError
    assert place.tree() == {} and not folder.exists()

    with pytest.raises(RuntimeError), place.writing_folder(continued=True) as folder:
        folder.mkdir(parents=True)
        (folder / "first").write_text("1")
        raise RuntimeError
    with place.writing_folder(continued=True) as folder:
        assert (folder / "first").read_text() == "1"  # an interrupted call goes on
        (folder / "second").write_text("2")
    assert set(place.tree()) == {"first", "second"} and not folder.exists()
    with place.writing_folder(continued=True) as folder:
        (folder / "first").unlink()
    assert set(place.tree()) == {"second"}
    here = Place.of(tmp_path / "folder")
    with here.writing_folder() as folder:
        assert folder == here.path == here.scratch()


def test_a_mount_that_goes_away() -> None:
    import errno

    for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
        sentence = plain_sentence(OSError(number, os.strerror(number), "/mnt/loa/store/mel/000000.tar"))
        assert sentence is not None and "/mnt/loa/store/mel/000000.tar" in sentence and "repeat" in sentence
