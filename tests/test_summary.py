"""What passes and ingest show of themselves in MLflow."""

import json

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from test_failures import here, mel_pass  # noqa: F401
from test_preprocess import RATE, clip, make_store, tone

from pipelines.features.report import PassReport
from pipelines.features.shard_work import ShardResult
from pipelines.features.summary import log_ingest, log_pass
from pipelines.ingest import main as ingest
from pipelines.tracking import Tracker, mlflow, opened_when_needed


def test_a_pass_shows_counts_reasons_histograms_and_sounds(here, tmp_path):  # noqa: F811
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    rows = [clip(tone(tmp_path / "sounds", i), licence="CC0" if i % 2 else "CC BY 4.0", seconds=1.0) for i in range(11)]
    store = make_store(tmp_path / "store", [*rows, clip(tmp_path / "silent.wav")])
    with opened_when_needed(work=tmp_path, job="preprocess-mel") as tracker:
        report = mel_pass(store, tracker=tracker)
        log_pass(tracker(), report, store)
        run_id, uri = tracker().handle().run_id, tracker().handle().uri
    client = mlflow().MlflowClient(uri)
    data = client.get_run(run_id).data
    assert client.get_run(run_id).info.status == "FINISHED"
    totals = {name.rpartition("/")[2]: value for name, value in data.metrics.items() if "/total/" in name}
    assert totals == {"in": 12, "kept": 11, "rejected": 1, "filtered": 0, "failed": 0}
    assert data.metrics["mel/shards"] == 3 and data.metrics["mel/hours_left"] == 0 and data.metrics["mel/times_real_time"] > 0
    assert [point.step for point in client.get_metric_history(run_id, "mel/clips_per_second")] == [1, 2, 3]

    def artifact(name):
        return open(client.download_artifacts(run_id, name, tmp_path), "rb").read()

    assert json.loads(artifact("reasons.json"))["data"] == [["rejected", "silent", 1]]
    assert [row[:2] for row in json.loads(artifact("licences.json"))["data"]] == [["CC BY 4.0", 6], ["CC0", 5]]
    assert artifact("histograms.png").startswith(b"\x89PNG")
    heard = client.list_artifacts(run_id, "samples/step_000000")
    assert len(heard) == 10 and len([a for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]) == 10
    histograms = report.histograms
    assert histograms["seconds"].sum() == histograms["loudness"].sum() == histograms["words"].sum() == 11
    assert histograms["loudness"][int((80 - 13.5) // 2)] == 11  # tones of amplitude 0.3: 20 log10(0.3 / sqrt 2) = -13.5 dB


def test_mlflow_out_of_reach_is_no_failure_of_the_pass(here, tmp_path, caplog):  # noqa: F811
    store = make_store(tmp_path / "store", [clip(tone(tmp_path / "sounds", 0))])
    with opened_when_needed("sqlite:////proc/nowhere/mlflow.db", work=tmp_path, job="preprocess-mel") as tracker:
        report = mel_pass(store, tracker=tracker)
        log_pass(tracker(), report, store)
    assert report.clips == 1 and "nothing of this run is logged" in caplog.text

    class Refusing(Tracker):
        def table(self, *_):
            raise ConnectionError("the server is away")

    caplog.clear()
    log_pass(Refusing.off(), report, store)
    assert "MLflow did not take the table of reasons: the server is away" in caplog.text


def test_counts_that_do_not_add_up_are_a_fault():
    report = PassReport("mel")
    report.add(ShardResult(0, clips=4, kept=2, filtered=1))
    with pytest.raises(AssertionError, match="do not add up"):
        report.counts()


def test_an_ingest_shows_the_same_of_recordings(tmp_path):
    for number in range(12):
        tone(tmp_path / "sounds", number)
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"not audio at all")
    (tmp_path / "sounds" / "captions.csv").write_text("file,caption,licence\ntone003.wav,a steady tone,CC0\n")
    result = CliRunner().invoke(ingest, [str(tmp_path / "sounds"), "--work", str(tmp_path), "--tiny"])
    assert result.exit_code == 0, result.output
    client = mlflow().MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.`loa.job` = 'ingest'")
    totals = {name.rpartition("/")[2]: value for name, value in run.data.metrics.items() if "/total/" in name}
    assert totals == {"in": 13, "kept": 12, "rejected": 1, "filtered": 0, "failed": 0}
    names = [each.path for each in client.list_artifacts(run.info.run_id)]
    assert {"reasons.json", "licences.json", "histograms.png"} <= set(names)
    assert len(client.list_artifacts(run.info.run_id, "samples/step_000000")) == 10


def test_ingest_counts_must_add_up(tmp_path):
    with pytest.raises(AssertionError, match="do not add up"):
        log_ingest(Tracker.off(), None, {"listed": 3, "recordings": 1, "rejected": 1})
