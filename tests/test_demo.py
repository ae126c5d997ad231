"""The whole line in one run: recordings in, a bundle, scores and a report out; then what a kill and bad input do to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from safetensors.torch import load_file

from pipelines.demo import PRESETS, Demo, main
from pipelines.evaluation.results import Evaluation
from pipelines.features.store import FeatureStore
from pipelines.ingest import ingest
from stages import STAGES
from stages.base import read_card
from stages.config import Recipe
from stages.variants import Recipes, Variant, resolve

REPO = Path(__file__).resolve().parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
STEPS = {name: Recipe(6, 4, 1e-3, warmup_steps=2, validate_every=6, checkpoint_every=3) for name in Recipes.__dataclass_fields__}
SMALL = replace(PRESETS["quick"], clips_per_kind=4, evaluated_clips=4, sampling_steps=2)

DIFFUSERS_ALONE = """
import sys
sys.path = [p for p in sys.path if p not in ("", {repo!r})]
import diffusers, numpy
pipeline = diffusers.AudioLDM2Pipeline.from_pretrained({bundle!r})
sound = pipeline("a dog barks", num_inference_steps=2, audio_length_in_s=1.0).audios[0]
assert "stages" not in sys.modules and "pipelines" not in sys.modules
assert sound.shape == (16000,) and numpy.isfinite(sound).all() and numpy.abs(sound).max() > 0, sound
"""


def hurried(variant: str = "audioldm2-full") -> Variant:
    """The tiny twin with six steps per stage."""
    return replace(resolve(variant, tiny=True), recipes=Recipes(**STEPS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    """A project folder with a whole demo in it."""
    work = tmp_path_factory.mktemp("demo")
    Demo(work, None, hurried(), SMALL, workers=0, tracking_uri=None, seed=0).run()  # Ray Train has tests of its own
    return work


@pytest.mark.slow
def test_demo_makes_everything(finished: Path) -> None:
    steps = json.loads((finished / "steps.json").read_text())
    assert [s["step"] for s in steps][:3] == ["corpus", "ingest", "mel"] and steps[-1]["step"] == "report"
    assert len(steps) == 17 and all(s["seconds"] > 0 and s["peak_memory_mb"] > 0 for s in steps)
    report = (finished / "report.html").read_text()
    assert "<audio" in report and "http://" not in report.replace("http://www.w3.org", "")
    scores = json.loads((finished / "evaluation" / "evaluation.json").read_text())["scores"]
    assert 0.0 <= scores["accuracy"]["generated"] <= 1.0 and {"real", "vae", "vocoder", "chance"} <= scores["accuracy"].keys()


@pytest.mark.slow
def test_bundle_sounds_in_diffusers_alone(finished: Path, tmp_path: Path) -> None:
    code = DIFFUSERS_ALONE.format(repo=str(REPO), bundle=str(finished / "bundle"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_second_call_does_nothing_again(finished: Path) -> None:
    def written() -> dict[Path, int]:
        """Weights, shards and sounds, without MLflow's copies of those: scores are taken, and logged, again."""
        kept = [p for p in finished.rglob("*") if "mlartifacts" not in p.parts]
        return {p: p.stat().st_mtime_ns for p in kept if p.suffix in (".safetensors", ".tar", ".wav") or p.name == "stage.json"}

    before = written()
    Demo(finished, None, hurried(), SMALL, workers=0, tracking_uri=None, seed=0).run()
    assert written() == before


@pytest.mark.slow
def test_mlflow_holds_every_job_under_the_demo(finished: Path) -> None:
    from pipelines.page.runs import read_runs

    runs = {run.job: run for run in read_runs(finished)}
    assert {"demo", "mel", "train-vae", "train-joint", "evaluate"} <= runs.keys()
    assert {"train/mel_l1", "val/mel_l1", "speed/clips_per_second"} <= runs["train-vae"].metrics.keys()


@pytest.mark.slow
def test_recordings_without_labels_reach_the_report(ray_cluster: object, tmp_path: Path) -> None:
    """A folder of sounds and captions, as README offers it: no classifier, everything else."""
    data, work, rng = tmp_path / "sounds", tmp_path / "work", np.random.default_rng(0)
    data.mkdir()
    rows = ["file,caption"]
    for i in range(36):
        soundfile.write(data / f"{i}.wav", 0.1 * rng.standard_normal(40_960), 16_000)
        rows.append(f"{i}.wav,a hiss of kind {i}")
    (data / "captions.csv").write_text("\n".join(rows))
    Demo(work, data, hurried(), SMALL, workers=0, tracking_uri=None, seed=0).run()
    notes = {step["step"]: step["note"] for step in json.loads((work / "steps.json").read_text())}
    assert len(notes) == 16 and "skipped: the recordings have no labels" in notes["train-classifier"]
    assert not (work / "stages" / "classifier").exists() and "<audio" in (work / "report.html").read_text()
    found = Evaluation.read(work)
    assert found is not None and "clap_score" in found.scores and "accuracy" in found.missing


def test_other_settings_do_not_mix_into_a_demo(tmp_path: Path) -> None:
    from stages.errors import UserError

    demo = Demo(tmp_path, None, hurried(), SMALL, 1, None, 0)
    demo._check_same()
    with pytest.raises(UserError, match="other data, variant, preset"):
        Demo(tmp_path, None, hurried(), SMALL, 1, None, seed=1)._check_same()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variant", "audioldm2-ful"], "audioldm2-full"),
        (["--set", "recipes.vae.stepz=3"], "steps"),
        (["--data", "/nonexistent/recordings"], "is not a folder"),
        (["--presset", "full"], "--preset"),
    ],
)
def test_bad_input_gets_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*arguments, "--work", str(tmp_path / "w")])
    assert result.exit_code != 0 and sentence in result.output and "Traceback" not in result.output


# ---------------------------------------------------------------------------------------------------------- power cuts

# The cluster is as wide as the tests' own: encoders get as many threads as the machine lends them, sums are rounded by
# the number of threads, and Adam makes 1e-5 of the weights out of that after six steps.
ONE_CALL = """
from pathlib import Path
from pipelines import cluster
from test_demo import SMALL, Demo, hurried

if __name__ == "__main__":
    cluster.connect(num_cpus=4)
    Demo(Path({work!r}), Path({data!r}), hurried(), SMALL, workers=0, tracking_uri=None, seed=0).run()
"""


@pytest.mark.slow
def test_killed_demo_is_finished_by_the_same_call(finished: Path, tmp_path: Path, rounds: Callable[..., Any]) -> None:
    """SIGKILL to the whole process group in a training (`make soak`: in every step): the weights do not tell.

    A stopped evaluation has a test of its own.
    """
    work = tmp_path / "killed"
    script = tmp_path / "one_call.py"
    script.write_text(ONE_CALL.format(work=str(work), data=str(finished / "recordings")))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]), "PYTHONUNBUFFERED": "1"}

    def call(log: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(script)], env=env, start_new_session=True, stdout=log.open("wb"), stderr=subprocess.STDOUT
        )

    every = [s["step"] for s in json.loads((finished / "steps.json").read_text()) if s["step"] not in ("corpus", "report")]
    for step, delay in rounds([("train-vae", 1.5)], [(step, 0.28 * k) for k, step in enumerate(every)]):
        log = tmp_path / f"{step}.log"
        victim = call(log)
        deadline = time.monotonic() + 300
        while f"({step};" not in log.read_text(errors="replace"):
            assert victim.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.1)
        time.sleep(delay)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        assert not (work / "report.html").exists()
    log = tmp_path / "last.log"
    assert call(log).wait(400) == 0, log.read_text()[-2000:]
    assert (work / "report.html").is_file()
    for stage in STAGES:
        for path in sorted((finished / "stages" / stage).rglob("*.safetensors")):
            whole, resumed = load_file(path), load_file(work / "stages" / stage / path.relative_to(finished / "stages" / stage))
            assert whole.keys() == resumed.keys()
            furthest = max(float((whole[k].float() - resumed[k].float()).abs().max()) for k in whole)
            assert furthest <= 1e-6, f"{stage}/{path.name} is {furthest:.1e} off"


# ------------------------------------------------------------------------------------------------ through ray job submit


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def head() -> Iterator[str]:
    """The dashboard's address of a cluster of its own, as `ray start --head` begins it; `ray` is on the PATH of its jobs.

    It listens on 127.0.0.1 alone and wants the token of these tests: both are in the environment (conftest.py).
    """
    ports = [free_port() for _ in range(3)]
    env = os.environ | {
        "RAY_worker_niceness": "0",  # workers run at 15 otherwise: beside other tests they would hardly run at all
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("RAY_ADDRESS", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        command = [
            *RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
            "--object-store-memory=200000000",
            "--disable-usage-stats",
            f"--port={ports[0]}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}",  # the default one belongs to the cluster that other tests share
        ]
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{ports[1]}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def submit(address: str, *job: str) -> None:
    """`ray job submit --working-dir . -- python -m …` until its end; waits for a cluster that is still coming up."""
    command = [*RAY, "job", "submit", "--address", address, "--working-dir", str(REPO), "--", "python", "-m", *job]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        said = done.stdout + done.stderr
        starting = "No available agent" in said or "Failed to connect to Ray" in said
        if not starting or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, said[-3000:]


@pytest.mark.slow
def test_jobs_run_when_submitted_to_a_cluster(head: str, tmp_path: Path) -> None:
    """The mel pass and one training job."""
    recordings, work = tmp_path / "recordings", tmp_path / "work"
    recordings.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        soundfile.write(recordings / f"{i}.wav", 0.1 * rng.standard_normal(40_960), 16_000)
        (recordings / f"{i}.txt").write_text("a hiss")
    variant = hurried()
    ingest([recordings], str(work / "store"), variant.audio)
    submit(head, "pipelines.preprocess", "mel", "--work", str(work), "--tiny")
    short = ("--set", "recipes.audiomae.steps=3", "--set", "recipes.audiomae.global_batch=4")
    submit(head, "pipelines.train", "audiomae", "--work", str(work), "--tiny", "--gpu", "0", *short)
    assert len(FeatureStore.open(str(work / "store")).reader(["mel"])) == 40
    assert read_card(work / "stages" / "audiomae", "audiomae")["steps"] == 3
