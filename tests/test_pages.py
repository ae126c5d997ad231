"""Every command of the README and the pages that can run on one machine is run here, in the order in which it stands.

Trainings take two steps and generation two, whatever the page says; everything else is the page's own words. A command that cannot
run here stands in ELSEWHERE with the reason, and a page that gains a command must gain a run or a reason.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

import loa
from stages import STAGES

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted(page for page in (REPO / "docs").glob("*.md") if page.name != "log.md")]

ELSEWHERE = {
    "loa serve": "test_serving.py keeps a service up",
    "loa demo": "test_demo.py",
    "loa completion": "appends to the user's shell settings; test_cli.py",
    "loa judges weights/judges": "public weights that no test has; test_judges.py with small ones",
    "loa import": "public weights that no test has; test_import.py with small ones",
    "loa preprocess text --with clap=cvssp/audioldm2": "a hub id; test_import.py with a folder",
    "loa preprocess mel --shards 0-99": "a store of more shards; test_preprocess.py with three",
    "loa score ours/": "public weights of judges; test_scores.py with small ones",
    'loa evaluate --name "AudioLDM 2-Full"': "public weights; test_scores.py and test_evaluate.py with small ones",
    "loa compare outputs other-project": "a second project; test_compare.py",
    "loa finetune": "a bundle that has learned something; test_finetune.py makes one",
    "loa selfcheck": "public weights; test_selfcheck.py with small ones, whole and damaged",
    "loa export --lora": "adapters; test_lora.py",
    'loa generate "rain on my roof"': "what finetuning left; test_finetune.py, test_lora.py",
    "loa evaluate --work mine/": "what finetuning left; test_finetune.py",
    "loa compare mine/before": "a second project; test_compare.py",
    "make ": "Makefile: CI's own first step, and test_repo.py",
    "pip ": "an installation",
    "python3 -m venv": "an installation",
    "export ": "a cluster's environment",
    "ray ": "a cluster of several machines",
    "submit": "a job of a cluster; test_demo.py submits one",
}


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks; a remark `# then a, b` stands for the same command with its last name replaced."""
    for line in (line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()):
        command, _, remark = (part.strip() for part in line.partition("#"))
        yield command
        if remark.startswith("then "):
            verb, rest = re.fullmatch(r"(loa \w+) \w+(.*)", command).groups()  # type: ignore[union-attr]
            yield from (f"{verb} {name}{rest}" for name in re.split(r", ", remark.removeprefix("then ")))


def reason(command: str) -> str | None:
    return next((why for start, why in ELSEWHERE.items() if command.startswith(start)), None)


def shortened(words: list[str]) -> list[str]:
    """With two steps of training or sampling, and four clips to evaluate; what is full size is only resolved."""
    match words:
        case ["train", *options] if "--tiny" not in options:
            return words if "--dry-run" in words else [*words, "--dry-run"]
        case ["train", *stages_and_options]:
            short = {"steps": 2, "global_batch": 2, "validate_every": 2, "checkpoint_every": 2, "warmup_steps": 0, "max_seconds": "null"}
            stages = itertools.takewhile(lambda word: word in STAGES, stages_and_options)
            sets = [word for stage in stages for name, value in short.items() for word in ("--set", f"recipes.{stage}.{name}={value}")]
            return [*words, *sets, *([] if "--workers" in words else ["--workers", "0"])]
        case ["evaluate", *_]:
            return [*words, "--num-clips", "4", "--steps", "2"]
        case ["generate", *_]:
            return [*words, "--steps", "2"]
    return words


def run(command: str) -> str:
    result = CliRunner().invoke(loa.main, shortened(shlex.split(command)[1:]))
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Iterator[Path]:
    """A folder with `recordings/` in it: a folder of sounds for the README, where commands are run."""
    from pipelines.demo_corpus.make import make_demo_corpus

    folder = tmp_path_factory.mktemp("pages")
    make_demo_corpus(folder / "recordings", 0, 4, 2.56)
    shutil.copytree(folder / "recordings", folder / "DIR")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LOA_WORK", raising=False)
        yield folder


@pytest.fixture(scope="module")
def walked(project: Path) -> Path:
    """The project after README's step by step."""
    ran = [command for command in commands(REPO / "README.md") if reason(command) is None]
    assert len(ran) == 11  # ingest, four passes, trainings of five and of three stages, export, evaluate, report, generate
    for command in ran:
        run(command)
    return project


@pytest.mark.slow
def test_readme_step_by_step(walked: Path) -> None:
    sound, rate = soundfile.read(walked / "rain.wav")
    assert rate == 16_000 and len(sound) and np.isfinite(sound).all()
    assert (walked / "outputs" / "evaluation" / "evaluation.json").is_file()


@pytest.mark.slow
def test_commands_of_the_other_pages(walked: Path) -> None:
    """After the README's, in the same project; `docs/running.md` ingests a folder of its own."""
    said = {}
    for page in PAGES[1:]:
        for command in commands(page):
            if reason(command) is None:
                own = ["--work", "running"] if page.name == "running.md" and "--variant" not in command else []
                shorter = command.replace("--measure --seconds 60", "--measure --seconds 1")  # of each of four passes
                said[command] = run(shlex.join([*shlex.split(shorter), *own]))
    assert "released to running/stages/vae" in said["loa train vae --tiny --workers 0"]
    assert "finished already" in said["loa train vae --tiny --workers 2"]  # the one above has trained it
    assert "GB of state per worker" in said["loa train diffusion --variant audioldm2-full --workers 8 --dry-run"]
    assert "Recognised by the classifier" in said["loa evaluate"]


@pytest.mark.slow
def test_snippets_of_python(walked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one of docs/evaluation.md needs public weights, that of docs/stages.md is an outline."""
    for page, shown in (("store.md", r"^\S+ \(256, 64\)$"), ("troubleshooting.md", r"Name: count, dtype")):
        (snippet,) = blocks(REPO / "docs" / page, "python")
        exec(compile(snippet, page, "exec"), {})
        assert re.search(shown, capsys.readouterr().out, re.MULTILINE), page


def test_every_command_is_run_or_has_its_reason() -> None:
    lines = [command for page in PAGES for command in commands(page)]
    assert [line for line in lines if not line.startswith("loa ") and reason(line) is None] == []
    assert [start for start in ELSEWHERE if not any(line.startswith(start) for line in lines)] == []
