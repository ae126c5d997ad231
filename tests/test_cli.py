"""The `loa` command: quick to start, helpful when mistyped, and plain about errors."""

import errno
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import loa
from stages import cli
from stages.errors import AudioError, UserError

REPO = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> Any:
    return CliRunner().invoke(loa.main, arguments, prog_name="loa")


def failing(error: BaseException) -> click.Command:
    @click.command()
    @cli.friendly
    def command() -> None:
        raise error

    return command


# ----------------------------------------------------------------------------------------------------- the command


def test_help_imports_no_job() -> None:
    code = (
        "import sys, click.testing, loa\n"
        "result = click.testing.CliRunner().invoke(loa.main, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))\n"
    )
    heavy = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True, text=True).stdout
    assert heavy.strip() == "[]"


def test_help_names_every_job_in_the_order_of_a_first_visit() -> None:
    text = run("--help").output
    places = [text.index(f"\n  {name} ") for name in loa.JOBS]
    assert places == sorted(places)
    assert "Did you mean" not in text


@pytest.mark.parametrize("name", loa.JOBS)
def test_every_job_is_a_command_that_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage: loa" in result.output and "--help" in result.output
    assert len(result.output.splitlines()) > 4


@pytest.mark.parametrize("name", [name for name, job in loa.JOBS.items() if job.target.startswith("pipelines.")])
def test_jobs_are_the_modules_that_python_m_runs(name: str) -> None:
    module, _, attribute = loa.JOBS[name].target.partition(":")
    source = Path(str(importlib.import_module(module).__file__)).read_text()
    assert 'if __name__ == "__main__":\n    main()' in source
    assert attribute == "main"


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("generat", "generate")])
def test_mistyped_commands_are_recognised(typed: str, meant: str) -> None:
    result = run(typed)
    assert result.exit_code == 2
    assert f"No such command {typed!r}. Did you mean {meant}" in result.output


def test_unknown_commands_get_the_list() -> None:
    result = run("xyzzy")
    assert result.exit_code == 2
    assert "There are: demo, variants, ingest" in result.output


def test_version() -> None:
    assert run("--version").output == f"loa, version {loa.__version__}\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_LOA_COMPLETE" in result.output


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [([], "ex", ["export"]), ([], "c", ["completion"]), (["variants"], "--ti", ["--tiny"]), (["train"], "vo", ["vocoder"])],
)
def test_completion(words: list[str], incomplete: str, expected: list[str]) -> None:
    completer = ShellComplete(loa.main, {}, "loa", "_LOA_COMPLETE")
    assert [item.value for item in completer.get_completions(words, incomplete)] == expected


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [UserError("the folder x holds no clips"), AudioError("the folder x holds no clips")])
def test_errors_for_people_are_one_sentence(error: Exception) -> None:
    result = CliRunner().invoke(failing(error))
    assert (result.exit_code, result.output) == (1, "Error: the folder x holds no clips\n")


def test_causes_are_searched_for_the_sentence() -> None:
    """A worker's UserError comes back from Ray as a subclass whose text is a traceback, or inside `worker_failures`."""

    class RayTaskError(UserError):
        cause = UserError("clip 7 is silent")

    class WorkerGroupError(Exception):
        worker_failures = {0: RayTaskError("Traceback (most recent call last): …")}

    assert cli.plain_sentence(RayTaskError("Traceback …")) == "clip 7 is silent"
    assert cli.plain_sentence(WorkerGroupError()) == "clip 7 is silent"
    outer = RuntimeError("training failed")
    outer.__cause__ = WorkerGroupError()
    assert cli.plain_sentence(outer) == "clip 7 is silent"


def test_the_file_system_is_explained() -> None:
    assert cli.plain_sentence(FileNotFoundError(errno.ENOENT, "No such file", "a.csv")) == "a.csv does not exist"
    assert "no permission to use b" in str(cli.plain_sentence(PermissionError(errno.EACCES, "denied", "b")))
    assert "no space left" in str(cli.plain_sentence(OSError(errno.ENOSPC, "full")))


def test_faults_of_ours_keep_their_traceback() -> None:
    result = CliRunner().invoke(failing(KeyError("surprise")))
    assert isinstance(result.exception, KeyError)


def test_debugging_shows_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOA_DEBUG", "1")
    result = CliRunner().invoke(failing(UserError("why")))
    assert isinstance(result.exception, UserError)


def test_interrupting_says_that_nothing_is_lost() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert "the same command continues" in result.output


# --------------------------------------------------------------------------------------------------------- options


@click.command()
@cli.work_option
@cli.variant_option
@cli.set_option
@cli.with_option
@cli.tracking_option
def options(**values: Any) -> None:
    click.echo(repr(values))


def test_options_have_one_meaning() -> None:
    result = CliRunner().invoke(options, ["--set", "diffusion.condition_dropout=0.2", "--set", "a=b=c", "--with", "clap=weights/clap"])
    values = eval(result.output, {"PosixPath": Path})
    assert values["settings"] == {"diffusion.condition_dropout": "0.2", "a": "b=c"}
    assert values["released"] == {"clap": "weights/clap"}
    assert (values["work"], values["variant"], values["tracking_uri"]) == (Path(cli.DEFAULT_WORK), cli.DEFAULT_VARIANT, None)


@pytest.mark.parametrize("text", ["clap", "clap=", "=folder"])
def test_pairs_without_a_side_are_refused(text: str) -> None:
    result = CliRunner().invoke(options, ["--with", text])
    assert result.exit_code == 2
    assert "is not of the form STAGE=FOLDER" in result.output


def test_pairs_given_twice_are_refused() -> None:
    result = CliRunner().invoke(options, ["--with", "vae=a", "--with", "vae=b"])
    assert result.exit_code == 2
    assert "vae is given twice: 'a' and 'b'" in result.output


def test_variants_are_completed() -> None:
    found = ShellComplete(options, {}, "options", "_OPTIONS_COMPLETE").get_completions(["--variant"], "audioldm2-l")
    assert [item.value for item in found] == ["audioldm2-ljs", "audioldm2-ljs-pretrained"]


# --------------------------------------------------------------------------------------------------------- machine


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    cli.require_disk(tmp_path / "not" / "yet" / "there", 0.0)
    cli.require_disk("s3://bucket/store", 1e9)
    with pytest.raises(UserError, match=r"needs about 1000000000\.0 GB of disk and .* GB are free"):
        cli.require_disk(tmp_path / "work", 1e9)


def test_too_little_memory_is_refused() -> None:
    cli.require_memory(0.0)
    with pytest.raises(UserError, match=r"needs about 1000000\.0 GB of memory and .* GB are available"):
        cli.require_memory(1e6)


def test_a_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5000))  # the machine's own changes between two looks
    assert cli.available_memory(tmp_path / "no-cgroup") == 5000
    (tmp_path / "memory.max").write_text("max\n")
    assert cli.available_memory(tmp_path) == 5000
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 250\nactive_file 5\n")
    assert cli.available_memory(tmp_path) == 550  # what is cached can be given back
