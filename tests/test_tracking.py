"""Runs are found again by key, nothing buffered is lost, and what was logged can be read back."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from pipelines import outbox
from pipelines.outbox import Outbox
from pipelines.page.runs import read_runs
from pipelines.tracking import RunHandle, Tracker, run_key, tracking_uri
from stages.audio import load_audio
from stages.errors import UserError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A project folder whose MLflow database is made once (1.5 s)."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def own_database(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client_of(tracker):
    import mlflow

    return mlflow.MlflowClient(tracker.handle().uri)


def artifacts(tracker, path=None):
    found = client_of(tracker).list_artifacts(tracker.handle().run_id, path)
    return [name for f in found for name in (artifacts(tracker, f.path) if f.is_dir else [f.path])]


def test_a_restarted_job_continues_its_run(work):
    with Tracker.open(work=work, job="train-vae", variant="tiny") as first:
        first.metrics({"train/loss": 3.0}, 10)
        first.metrics({"train/loss": 2.0}, 20)
    with Tracker.open(work=work, job="train-vae", variant="tiny") as again:
        again.metrics({"train/loss": 1.9}, 20)  # a step that the killed run had logged already
        again.metrics({"train/loss": 1.0}, 30)
    assert again.handle() == first.handle()
    (run,) = [run for run in read_runs(work) if run.job == "train-vae"]
    steps, values = run.metrics["train/loss"]
    assert steps.tolist() == [10, 20, 30] and values.tolist() == [3.0, 1.9, 1.0]
    assert run.status == "FINISHED" and run.tags["loa.variant"] == "tiny"
    with Tracker.open(work=work, job="train-vae", variant="tiny", fresh=True) as fresh:
        assert fresh.handle() != first.handle()
    assert [run.run_id for run in read_runs(work) if run.job == "train-vae"] == [fresh.handle().run_id]


def test_the_way_a_block_ends_is_the_status_of_its_run(work):
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")):
        with pytest.raises(error), Tracker.open(work=work, job=f"ends-{status}-{error.__name__}") as tracker:
            tracker.metrics({"last": 1.0}, 1)
            raise error()
        run = client_of(tracker).get_run(tracker.handle().run_id)
        assert run.info.status == status
        assert run.data.metrics == {"last": 1.0}


def test_a_worker_writes_to_the_drivers_run_and_leaves_its_status_alone(work):
    with Tracker.open(work=work, job="worker") as driver:
        handle = pickle.loads(pickle.dumps(driver.handle()))
        with Tracker.resume(handle) as worker:
            worker.metrics({"val/mel_l1": 0.5}, 100)
        run = client_of(driver).get_run(handle.run_id)
        assert run.info.status == "RUNNING" and run.data.metrics == {"val/mel_l1": 0.5}


def test_parents_have_children(work):
    with Tracker.open(work=work, job="demo") as parent, Tracker.open(work=work, job="child", parent=parent) as child:
        tags = client_of(child).get_run(child.handle().run_id).data.tags
        assert tags["mlflow.parentRunId"] == parent.handle().run_id


def test_params_are_flat_whole_and_may_change(work):
    with Tracker.open(work=work, job="params") as tracker:
        many = {f"p{i}": i for i in range(230)}
        tracker.params({"model": {"width": 64, "heads": (2, 4), "name": "x" * 7000}, "rate": 1.23456789e-5, **many})
        tracker.params({"model": {"width": 128}, "p0": 0})
        run = client_of(tracker).get_run(tracker.handle().run_id)
        assert run.data.params["model.heads"] == "[2, 4]" and float(run.data.params["rate"]) == 1.23456789e-5
        assert len(run.data.params) == 234 and len(run.data.params["model.name"]) == 6000
        assert run.data.params["model.width"] == "64" and run.data.tags["changed/model.width"] == "128"
        assert "changed/p0" not in run.data.tags


def test_sounds_images_tables_and_files_are_artifacts(work, tmp_path):
    wave = np.sin(np.arange(1600) * 0.2).astype(np.float32) * 0.5
    with Tracker.open(work=work, job="artifacts") as tracker:
        tracker.audio("vae_0", wave, 16_000, 250)
        tracker.spectrogram("vae_0", np.zeros((64, 16)), 250)
        tracker.table("clips", ["clip_id", "score"], [["a", 1.0]])
        tracker.table("clips", ["clip_id", "score"], [["a", 2.0], ["b", 0.5]])
        tracker.file("plots/x.png", b"png")
        there = artifacts(tracker)
        assert {"samples/step_000250/vae_0.wav", "clips.json", "plots/x.png"} <= set(there)
        assert any(path.startswith("images/mel~vae_0+step+250") for path in there)
        path = client_of(tracker).download_artifacts(tracker.handle().run_id, "samples/step_000250/vae_0.wav", str(tmp_path))
        assert np.abs(load_audio(path, 16_000) - wave).max() < 1e-4
        table = Path(client_of(tracker).download_artifacts(tracker.handle().run_id, "clips.json", str(tmp_path)))
        assert json.loads(table.read_text()) == {"columns": ["clip_id", "score"], "data": [["a", 2.0], ["b", 0.5]]}
        tags = client_of(tracker).get_run(tracker.handle().run_id).data.tags
        assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "clips.json", "type": "table"}]


def test_a_bundle_is_registered_once(work, tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with Tracker.open(work=work, job="export") as tracker:
        assert tracker.register(tmp_path, name="loa-tiny") == "1"
        assert tracker.register(tmp_path, name="loa-tiny", alias="champion") == "1"
        save_file({"w": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
        assert tracker.register(tmp_path, name="loa-tiny") == "2"
        client = client_of(tracker)
        assert str(client.get_model_version_by_alias("loa-tiny", "newest").version) == "2"
        assert str(client.get_model_version_by_alias("loa-tiny", "champion").version) == "1"
        assert client.get_model_version("loa-tiny", "1").source == tmp_path.as_uri()


class Flaky:
    """A store that refuses the first few requests."""

    def __init__(self, failures):
        self.failures, self.asked, self.got, self.files, self.images = failures, 0, [], {}, []

    def _answer(self):
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")

    def log_batch(self, run_id, metrics):
        self._answer()
        self.got += [(m.key, m.value, m.step) for m in metrics]

    def log_artifacts(self, run_id, folder):
        self._answer()
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        self.files |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def log_image(self, run_id, picture, key, step, timestamp, synchronous):
        self._answer()
        assert synchronous and timestamp > 0
        self.images.append((key, step, picture.size))


FOREVER = 10**6


def test_metrics_wait_for_a_store_that_is_away(caplog):
    store = Flaky(failures=1)
    box = Outbox(store, "run")
    for step in range(2500):
        box.metrics({"loss": float(step)}, step)
    assert len(caplog.records) == 1 and "away" in caplog.text
    assert store.asked == 1  # and is not asked again at every step
    box.send()
    assert store.got == [("loss", float(step), step) for step in range(2500)]


def put(box, text, step):
    """A metric, a file and a picture."""
    box.metrics({"loss": float(step)}, step)
    with box.files() as folder:
        (folder / "sounds").mkdir()
        (folder / "sounds" / f"{step}.txt").write_text(text)
    box.image(np.zeros((2, step, 3), np.uint8), "mel/x", step)


def test_what_a_store_does_not_take_waits_on_disk(tmp_path, caplog):
    """Also beyond the end of the process: the next one of the same run sends it."""
    gone = Outbox(Flaky(FOREVER), "run", tmp_path / "unsent" / "run")
    put(gone, "one", 1)
    put(gone, "two", 2)
    gone.close()
    assert len(caplog.records) == 2 and "the next call of the same command sends it" in caplog.text
    store = Flaky(failures=1)
    back = Outbox(store, "run", tmp_path / "unsent" / "run")
    back.adopt()
    back.send_quietly()
    assert store.files == {} and back.away
    put(back, "three", 3)
    back.close()
    assert store.files == {"sounds/1.txt": b"one", "sounds/2.txt": b"two", "sounds/3.txt": b"three"}
    assert store.images == [("mel/x", step, (step, 2)) for step in (1, 2, 3)]
    assert sorted(store.got) == [("loss", float(step), step) for step in (1, 2, 3)]
    assert not (tmp_path / "unsent").exists()


def test_a_folder_that_cannot_be_made_is_no_end(tmp_path, caplog):
    """A worker on another machine may not reach the project's."""
    (tmp_path / "file").write_text("")
    store = Flaky(failures=2)
    box = Outbox(store, "run", tmp_path / "file" / "run")
    put(box, "one", 1)
    box.close()
    assert "nothing sends it by itself" in caplog.text and box.own.is_dir()
    box.close()
    assert store.files == {"sounds/1.txt": b"one"} and not box.own.exists()


def test_half_an_artifact_is_never_sent(tmp_path):
    store = Flaky(failures=0)
    box = Outbox(store, "run", tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), box.files() as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    box.close()
    assert store.asked == 0 and not (tmp_path / "run").exists()


def test_a_tracker_that_nobody_closed_still_sends():
    tracker = Tracker.off()
    store = tracker._outbox.client = Flaky(failures=0)
    tracker._outbox.metrics({"loss": 1.0}, 7)
    del tracker
    assert store.got == [("loss", 1.0, 7)]


def test_off_writes_nowhere(tmp_path):
    with Tracker.off() as tracker:
        tracker.params({"a": 1})
        tracker.metrics({"a": 1.0}, 1)
        tracker.audio("a", np.zeros(10), 16_000, 1)
        tracker.spectrogram("a", np.zeros((4, 4)), 1)
        tracker.table("a", ["x"], [[1]])
        tracker.artifact(tmp_path)
        assert tracker.register(tmp_path, name="a") == ""
    assert tracker.handle() == RunHandle() and Tracker.resume(None).handle() == RunHandle()


def test_where_runs_go(work, monkeypatch):
    assert tracking_uri("/x/project") == "sqlite:////x/project/mlflow.db"
    assert run_key("/x/project", "train-vae", "tiny") == "/x/project/train-vae/tiny"
    with pytest.raises(UserError, match="--tracking-uri"):
        tracking_uri("s3://bucket/project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org")
    assert tracking_uri("/x/project") == "http://mlflow.example.org" and tracking_uri("/x/project", "sqlite:///a.db") == "sqlite:///a.db"


def test_an_unusable_store_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says " * 100)
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used"):
        Tracker.open(work=tmp_path, job="train-vae")


def test_reading_a_folder_without_runs(tmp_path):
    assert read_runs(tmp_path) == [] and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- a server that goes away and comes back


class Server:
    """MLflow's server in this process, at a port of its own, which can go away and come back."""

    def __init__(self, folder, monkeypatch):
        import socket

        for name, value in {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the real three take a quarter of a minute
        }.items():
            monkeypatch.setenv(name, value)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.come()

    def come(self):
        from threading import Thread

        from mlflow.server import app
        from werkzeug.serving import make_server

        self.server = make_server("127.0.0.1", self.port, app, threaded=True)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def go(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.slow
def test_a_training_outlives_its_server(tmp_path, monkeypatch, caplog):
    """It is away during the first validation and back for the second one, away again from the last on; nothing is missing in the end."""
    from dataclasses import replace

    from tiny_store import make_store, small

    from pipelines.train import train_stage
    from pipelines.training.loop import _Run

    variant, work = small(), tmp_path / "work"
    make_store(work, variant)
    recipe = replace(variant.recipes.vae, steps=6, validate_every=2, checkpoint_every=3, global_batch=2)
    variant = replace(variant, recipes=replace(variant.recipes, vae=recipe))
    server = Server(tmp_path, monkeypatch)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    validate = _Run._validate

    def validated(self, *arguments):
        if self.progress.step in (2, 6):
            server.go()
        measures = validate(self, *arguments)
        if self.progress.step == 2:
            server.come()
        return measures

    monkeypatch.setattr(_Run, "_validate", validated)
    with Tracker.open(server.uri, work=work, job="train-vae") as tracker:
        train_stage("vae", variant, work, workers=0, tracker=tracker)
    assert (work / "stages" / "vae" / "stage.json").exists()
    assert "MLflow takes nothing at the moment" in caplog.text and "the next call of the same command sends it" in caplog.text
    left = sorted(path.suffix for path in (work / "unsent").glob("*/*/*"))
    assert left == [".image", ".image", ".metrics", ".tags"], left
    server.come()
    with Tracker.open(server.uri, work=work, job="train-vae") as tracker:
        train_stage("vae", variant, work, workers=0, tracker=tracker)  # finished already
    there = artifacts(tracker)
    for step in (2, 4, 6):
        for name in ("original", "reconstruction"):
            assert sum(path.startswith(f"images/mel~{name}+step+{step}+") and path.endswith(".png") for path in there) == 1, there
    history = client_of(tracker).get_metric_history(tracker.handle().run_id, "val/mel_l1")
    assert [metric.step for metric in history] == [2, 4, 6]
    assert '"step": 6' in client_of(tracker).get_run(tracker.handle().run_id).data.tags["loa.released"]
    assert client_of(tracker).get_run(tracker.handle().run_id).info.status == "FINISHED" and not (work / "unsent").exists()
    server.go()
