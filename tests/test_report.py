"""The report is one file, says what is there and what is not, and lets no caption break it."""

import json
import re
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipelines import plots
from pipelines.evaluation.results import Evaluation
from pipelines.page import render as page_module
from pipelines.page.markup import duration
from pipelines.page.picture import write_picture
from pipelines.page.project import Project
from pipelines.page.render import render
from pipelines.page.runs import Run
from pipelines.report import main, write_report
from stages.audio import write_wav
from stages.errors import UserError
from stages.files import Place, write_json

REPO = Path(__file__).resolve().parent.parent
NASTY = 'a "dog" <script>alert(1)</script> & barks'


@pytest.fixture
def evaluation(tmp_path):
    """An evaluation of three clips with its sounds."""
    rows = []
    for i in range(3):
        files = {}
        for system in ("generated", "vae", "vocoder", "real"):
            path = tmp_path / "evaluation" / system / f"clip-{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, np.random.default_rng(i).uniform(-0.5, 0.5, 5120).astype(np.float32), 16_000)
            files[system] = f"{system}/clip-{i}.wav"
        row = {"clip_id": f"clip-{i}", "corpus": "c", "text": NASTY, "transcript": "", "label": "Dog", "files": files}
        rows.append(row | {"recognised": "Dog" if i else "Rain", "clap_score": 0.3, "clap_score_real": 0.4})
    accuracy = {"chance": 0.5, "generated": 2 / 3, "vae": 1.0, "vocoder": 1.0, "real": 1.0}
    shares = {k: v for k, v in accuracy.items() if k != "chance"}
    return Evaluation(
        protocol={
            "variant": "tones",
            "sample_rate": 16_000,
            "seconds": 0.32,
            "num_inference_steps": 25,
            "guidance_scale": 3.5,
            "candidates": 1,
        },
        scores={"accuracy": accuracy, "mel_l1": {"vae": 0.4, "vocoder": 0.2}},
        intervals={"accuracy": {"generated": [0.2, 0.9]}},
        missing={"clap_score": "the clips have no captions"},
        notes=["few clips"],
        classes=[{"name": "Dog", "count": 3, **shares}],
        confusion={"names": ["Dog", "Rain"], "counts": [[2, 1], [0, 0]]},
        clips=rows,
    )


def project(tmp_path, **changes):
    empty = {"evaluation": None, "runs": [], "steps": [], "stages": {}, "bundle": {}, "store": None}
    return Project(**({"work": Place.of(tmp_path), "uri": "sqlite:///x.db"} | empty | changes))


def test_a_page_has_everything_inside(tmp_path, evaluation):
    steps = np.arange(10, 1010, 10)
    loss = {"train/mel_l1": (steps, 1 / steps), "val/mel_l1": (steps[::25], 2 / steps[::25]), "train/grad_norm/vae": (steps, 1.0 * steps)}
    run = Run("r", "train-vae", "train-vae", "FAILED", 0.0, 60.0, metrics=loss)
    costs = [{"step": "ingest", "seconds": 75.0, "peak_memory_mb": 1234.0, "note": "<b>9</b> clips"}]
    card = {"variant": "tones", "steps": 1000, "seconds": 4000.0, "validation": {"mel_l1": 0.31}, "config": {"vae": {"width": 3}}}
    page = render(project(tmp_path, evaluation=evaluation, runs=[run], steps=costs, stages={"vae": card}))
    assert page.count("data:audio/flac;base64,") == 12 and page.count("data:image/jpeg;base64,") == 12
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "url(" not in page.replace("url(#", "")
    assert NASTY not in page and "<script>alert" not in page and "&lt;script&gt;alert" in page and "&lt;b&gt;9" in page
    assert "66.7%" in page and "20.0% – 90.0%" in page and "not measured: the clips have no captions" in page and "few clips" in page
    assert "✗ recognised as Rain" in page and page.count("✓ recognised as Dog") == 2
    assert "1 min 15 s" in page and "1.2 GB" in page and "1 h 07 min" in page and "failed" in page
    assert "mel l1" in page and "grad norm" not in page
    assert "var(--ink)" in page and plots.PAGE.ink not in page and plots.PAGE.faint not in page


def test_sounds_stop_at_the_size_that_mails_and_browsers_take(tmp_path, evaluation, monkeypatch):
    whole = render(project(tmp_path, evaluation=evaluation))
    assert whole.count("<article") == 3 and "all 3 evaluated captions" in whole
    assert render(project(tmp_path, evaluation=evaluation), num_clips=2).count("<article") == 2
    monkeypatch.setattr(page_module, "MOST_BYTES", 1000)
    assert render(project(tmp_path, evaluation=evaluation)).count("<article") == 1


def test_a_bare_folder_has_a_report_that_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = write_report(tmp_path)
    page = path.read().decode()
    assert "loa evaluate" in page and "Nothing has been trained" in page and path.name == "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="no project folder"):
        write_report(tmp_path / "nowhere")


def test_steps_and_cards_are_read_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "stages" / "vae").mkdir(parents=True)
    write_json(tmp_path / "stages" / "vae" / "stage.json", {"stage": "vae", "variant": "audioldm2-ac", "steps": 7})
    write_json(tmp_path / "steps.json", [{"step": "train-vae", "seconds": 3.0, "peak_memory_mb": 100.0, "note": ""}])
    page = write_report(tmp_path, output=tmp_path / "page.html").read().decode()
    assert "<h1>audioldm2-ac</h1>" in page and "7 steps" in page and "100 MB" in page


def test_the_command_writes_page_and_picture(tmp_path, monkeypatch, evaluation):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_json(tmp_path / "evaluation" / "evaluation.json", asdict(evaluation))
    files = {"page": tmp_path / "pages" / "page.html", "picture": tmp_path / "pages" / "picture.png"}
    wanted = ["-o", str(files["page"]), "--picture", str(files["picture"]), "--num-clips", "2"]
    done = CliRunner().invoke(main, ["--work", str(tmp_path), *wanted])
    assert done.exit_code == 0, done.output
    assert "page.html; open it in a browser" in done.output and "picture.png" in done.output
    assert files["page"].read_text().count("<article") == 2
    assert sorted(path.name for path in files["page"].parent.iterdir()) == ["page.html", "picture.png"]


def test_the_picture_takes_the_first_clip_of_each_kind_and_stays_small(tmp_path, evaluation):
    """Sounds are white noise here: spectrograms that compress as badly as any."""
    kinds = ["Dog", "Dog", "Rain", "Bell", "Wind"]
    clips = [evaluation.clips[i % 3] | {"label": kind, "text": f"{kind} {i}"} for i, kind in enumerate(kinds)]
    drawn = {}
    grid = plots.spectrogram_grid

    def keep(rows, columns):
        drawn.update(rows=rows, columns=columns)
        return grid(rows, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "spectrogram_grid", keep)
        path = write_picture(project(tmp_path, evaluation=replace(evaluation, clips=clips)), tmp_path / "picture.png")
    assert drawn["columns"] == ["Dog 0", "Rain 2", "Bell 3"]
    assert {name: len(mels) for name, mels in drawn["rows"].items()} == {"real": 3, "VAE + vocoder": 3, "generated": 3}
    width, height = Image.open(path).size
    assert path.stat().st_size < 150_000 and 600 < width < 1200 and 200 < height < 600


def test_a_picture_needs_an_evaluation_with_its_sounds(tmp_path, evaluation):
    with pytest.raises(UserError, match=r"has no evaluation to draw; run `loa evaluate"):
        write_picture(project(tmp_path), tmp_path / "picture.png")
    (tmp_path / "evaluation" / "vae" / "clip-0.wav").unlink()
    with pytest.raises(UserError, match="sounds of the evaluation .* are gone"):
        write_picture(project(tmp_path, evaluation=evaluation), tmp_path / "picture.png")


def test_the_command_explains_itself_without_heavy_imports():
    code = (
        "import sys, pipelines.report\n"
        "print(sorted({'torch', 'pandas', 'matplotlib', 'PIL', 'mlflow', 'ray', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_durations_read_naturally():
    texts = [duration(s) for s in (0.25, 42.4, 59.7, 61, 1361, 3599, 7384)]
    assert texts == ["0.2 s", "42 s", "1 min 00 s", "1 min 01 s", "23 min", "1 h 00 min", "2 h 03 min"]


def test_mel_images_put_low_pitch_at_the_bottom_and_share_a_scale():
    mel = np.full((5, 4), plots.MEL_LOW)
    mel[:, 0] = plots.MEL_HIGH
    picture = plots.mel_image(mel, scale=2)
    assert picture.shape == (8, 5, 3) and picture.dtype == np.uint8
    assert picture[-1].min() > 180 and picture[0].max() < 10
    assert np.array_equal(plots.mel_image(np.full((2, 2), np.nan)), plots.mel_image(np.full((2, 2), plots.MEL_LOW)))


@pytest.mark.parametrize(
    "picture",
    [
        plots.curves(
            {
                "loss": [
                    plots.Curve("training", np.arange(100), np.r_[np.nan, np.ones(99)]),
                    plots.Curve("validation", np.arange(2), np.ones(2)),
                ]
            }
        ),
        plots.curves({"empty": [plots.Curve("training", np.zeros(0, int), np.zeros(0))]}),
        plots.confusion(["a", "b"], np.array([[2, 0], [1, 3]]), "title"),
        plots.class_bars(["a", "b"], {"generated": [0.5, 0.1], "real": [1.0, 0.9]}, 0.5, "title"),
        plots.spectrogram_grid({"real": [np.zeros((20, 8))] * 2, "generated": [np.zeros((20, 8))] * 2}, ["a dog", "rain"]),
        plots.spectrograms({"real": np.zeros((20, 8)), "generated": np.zeros((20, 8))}, 0.2, list(np.linspace(50, 8000, 8))),
    ],
)
def test_pictures_are_drawn_for_paper_and_page(picture):
    image = picture.png(dpi=60)
    width, height = struct.unpack(">II", image[16:24])
    assert image.startswith(b"\x89PNG") and width > 100 and height > 80
    markup = picture.svg('what "it" shows')
    assert markup.startswith('<svg role="img" aria-label="what &quot;it&quot; shows"') and "<style" not in markup
    assert "var(--ink)" in markup and picture.svg("x") == picture.svg("x")


def test_the_command_lines_name_this_project(tmp_path, evaluation):
    page = render(project(tmp_path / "w", uri=f"sqlite:///{tmp_path / 'w' / 'mlflow.db'}", evaluation=evaluation))
    assert "mlflow ui --backend-store-uri sqlite:///" in page and "loa serve --bundle" in page
    assert json.dumps(NASTY).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;") in page
