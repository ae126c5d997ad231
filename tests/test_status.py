"""`loa status`: how far a project is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_store import make_store, run_here, small

import loa
from pipelines.leases import lease
from pipelines.status import stage_statuses
from pipelines.train import train_stage
from pipelines.training.checkpoint import Checkpoints
from stages.files import Place


def state(work: Path, stage: str) -> tuple[str, str, str]:
    (status,) = [status for status in stage_statuses(Place.of(work)) if status.stage == stage]
    return status.state, status.steps, status.remark


def test_a_stage_from_nothing_to_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = small(steps=4)
    store = make_store(tmp_path, variant, clips=12)
    assert state(tmp_path, "vae")[0] == "not begun"

    def killed(self: Checkpoints, _: object) -> None:
        (run,) = [status for status in stage_statuses(Place.of(tmp_path)) if status.stage == "vae"]
        assert run.state == "running" and run.remark == "begins"  # nothing was logged yet
        (self.run / "progress.json").write_json({"step": 2, "share": 0.5, "seconds": 30.0, "train": {"train/kl": 0.25}, "val": {}})
        (run,) = [status for status in stage_statuses(Place.of(tmp_path)) if status.stage == "vae"]
        assert tuple(run) == ("vae", "running", "2 of 4", "kl 0.25", "about 30 s left")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        train_stage("vae", variant, tmp_path, workers=0)
    assert state(tmp_path, "vae") == ("stopped", "2 of 4", "the same command continues it")
    (tmp_path / "runs" / "vae" / "refused.txt").write_text("the clip x is damaged; repair it")
    assert state(tmp_path, "vae")[2] == "the clip x is damaged; repair it"

    output = train_stage("vae", variant, tmp_path, workers=0).path
    assert state(tmp_path, "vae") == ("finished", "4", "")
    with lease(Place.of(tmp_path / "runs" / ".vae.lease"), "the run"):
        assert state(tmp_path, "vae")[0] == "running"

    run_here("latent", store, variant, {"vae": output})
    train_stage("vocoder", variant, tmp_path, workers=0)
    card = json.loads((output / "stage.json").read_text())
    card["made_from"]["inputs"] = {"vocoder": "0" * 64}
    card["made_from"]["series"]["latent"] = "another"
    (output / "stage.json").write_text(json.dumps(card))
    assert state(tmp_path, "vae") == ("out of date", "4", "the series latent, the weights of vocoder changed since")


def test_the_command(tmp_path: Path) -> None:
    variant = small(steps=2)
    make_store(tmp_path, variant, clips=12)
    train_stage("classifier", replace(variant), tmp_path, workers=0)
    run = CliRunner().invoke(loa.main, ["status", "--work", str(tmp_path)])
    assert run.exit_code == 0, run.output
    lines = {line.split()[0]: line for line in run.output.splitlines() if line.strip()}
    assert "2 of 2 shards" in lines["mel"] and "finished" in lines["classifier"] and "not begun" in lines["joint"]
    empty = CliRunner().invoke(loa.main, ["status", "--work", str(tmp_path / "nothing")])
    assert empty.exit_code == 0 and empty.output.count("not begun") == 8 and not (tmp_path / "nothing").exists()


def test_weights_that_were_trained_again_are_seen(tmp_path: Path) -> None:
    """Only what lies in the project counts: weights given by --with stay where they are."""
    variant = small(steps=1)
    make_store(tmp_path, variant, clips=12)
    output = train_stage("vae", variant, tmp_path, workers=0).path
    card = json.loads((output / "stage.json").read_text())
    from stages.files import weights_hash

    train_stage("vocoder", variant, tmp_path, workers=0)
    card["made_from"]["inputs"] = {"vocoder": weights_hash(tmp_path / "stages" / "vocoder")}
    (output / "stage.json").write_text(json.dumps(card))
    assert state(tmp_path, "vae")[0] == "finished"
    path = tmp_path / "stages" / "vocoder" / "vocoder" / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    assert state(tmp_path, "vae") == ("out of date", "1", "the weights of vocoder changed since")
