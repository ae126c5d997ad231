"""The `loa` command: quick to start, helpful when mistyped, and plain about errors."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import friendly
import loa
import options as cli
from options import Reservation, worker_options
from stages import STAGES
from stages.errors import AudioError, UserError
from stages.files import Place

REPO = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> Any:
    return CliRunner().invoke(loa.main, arguments, prog_name="loa")


def failing(error: BaseException) -> click.Command:
    @click.command()
    @friendly.friendly
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


HEAVY = {"torch", "transformers", "diffusers", "ray", "mlflow", "pandas", "pyarrow", "soundfile", "matplotlib", "scipy", "fastapi"}


def test_help_of_a_command_imports_nothing_that_does_the_work() -> None:
    code = (
        "import sys, click.testing, loa\n"
        "for name in sys.argv[1:]:\n"
        "    result = click.testing.CliRunner().invoke(loa.main, [name, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        f"    print(name, sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *loa.JOBS], cwd=REPO, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in loa.JOBS]


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


@pytest.mark.parametrize("name", loa.JOBS)
def test_every_option_says_its_default(name: str) -> None:
    command = loa.main.get_command(click.Context(loa.main), name)
    assert command is not None
    silent = [
        option.opts[0]
        for each in (command.commands.values() if isinstance(command, click.Group) else [command])
        for option in each.params
        if isinstance(option, click.Option) and not option.is_flag and not option.required
        if not (option.show_default or "[default: " in (option.help or ""))
    ]
    assert silent == []


def test_all_commands_on_ray_ask_for_workers_in_the_same_words() -> None:
    found = {}
    for name in ("demo", "ingest", "preprocess", "train", "finetune"):
        command = loa.main.get_command(click.Context(loa.main), name)
        for each in command.commands.values() if isinstance(command, click.Group) else [command]:
            options = {p.opts[0]: (p.help, p.default) for p in each.params if p.name in ("workers", "cpu", "gpu", "memory")}
            assert list(options) == ["--workers", "--cpu", "--gpu", "--memory"], each.name
            found[name, each.name] = options
    assert len({str(options) for options in found.values()}) == 1 and len(found) == 9


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], (None, Reservation())),
        (["--workers", "0"], ((0, 0), Reservation())),
        (["--workers", "3", "--gpu", "0"], ((3, 3), Reservation(gpus=0.0))),
        (["--workers", "2-16", "--cpu", "2", "--gpu", "0.5", "--memory", "1.5"], ((2, 16), Reservation(2.0, 0.5, 1_500_000_000))),
        (["--workers", "16-2"], "'16-2' is no range"),
        (["--workers", "0-2"], "'0-2' is no range"),
        (["--workers", "-1"], "'-1' is neither a number of workers nor a range such as 1-16"),
        (["--workers", "two"], "'two' is neither"),
        (["--workers", "2-"], "'2-' is neither"),
        (["--gpu", "1.5"], "1.5 is neither a whole number of GPUs nor a share of one"),
        (["--cpu", "0"], "0.0 is not in the range x>0"),
    ],
)
def test_how_workers_are_asked_for(given: list[str], expected: tuple[object, Reservation] | str) -> None:
    @click.command()
    @worker_options
    def command(workers: object, reserve: Reservation) -> None:
        click.echo((workers, reserve))

    result = CliRunner().invoke(command, given)
    assert str(expected) in " ".join(result.output.split())
    assert (result.exit_code == 0) == (not isinstance(expected, str))


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
    assert "There are: demo, variants, plan, ingest" in result.output


def test_version() -> None:
    assert run("--version").output == f"loa, version {loa.__version__}\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_LOA_COMPLETE" in result.output


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [([], "ex", ["export"]), ([], "compl", ["completion"]), (["variants"], "--ti", ["--tiny"]), (["train"], "vo", ["vocoder"])],
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

    assert friendly.plain_sentence(RayTaskError("Traceback …")) == "clip 7 is silent"
    assert friendly.plain_sentence(WorkerGroupError()) == "clip 7 is silent"
    outer = RuntimeError("training failed")
    outer.__cause__ = WorkerGroupError()
    assert friendly.plain_sentence(outer) == "clip 7 is silent"


def test_the_file_system_is_explained() -> None:
    assert friendly.plain_sentence(FileNotFoundError(errno.ENOENT, "No such file", "a.csv")) == "a.csv does not exist"
    assert "no permission to use b" in str(friendly.plain_sentence(PermissionError(errno.EACCES, "denied", "b")))
    assert "no space left" in str(friendly.plain_sentence(OSError(errno.ENOSPC, "full")))


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


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers that an interactive command starts with, and afterwards those of the tests again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_a_sentence(handlers: None, number: int, status: int) -> None:
    """A wrapper may send the same wish twice; cleaning up is not broken off by that."""
    cleaned = []

    @click.command()
    @friendly.friendly
    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)
            cleaned.append(True)

    result = CliRunner().invoke(command)
    assert (result.exit_code, result.output.strip(), cleaned) == (status, friendly.STOPPED, [True])
    assert signal.getsignal(number) == signal.SIG_DFL  # from here on another one ends the process at once


def test_signals_that_the_parent_ignores_stay_ignored(handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    @click.command()
    @friendly.friendly
    def command() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        click.echo("went on")

    assert CliRunner().invoke(command).output == "went on\n"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---------------------------------------------------------------------------------- commands that messages name


def answer(arguments: list[str], say: Callable[[], str]) -> str:
    """What a command with loa's shared options prints."""

    @click.command()
    @cli.work_option
    @cli.variant_option
    @cli.tiny_option
    @cli.set_option
    @click.option("--store")
    @friendly.friendly
    def command(**values: Any) -> None:
        click.echo(say())

    return CliRunner().invoke(command, arguments).output.strip()


GIVEN = ["--tiny", "--work", "my work", "--variant", "audioldm2-ljs", "--set", "recipes.vae.steps=5", "--set", "vae.channels=8"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("loa preprocess loa --pooling 4", " --work 'my work' --variant audioldm2-ljs --tiny --set vae.channels=8 --store s3://b/s"),
        ("loa evaluate", " --work 'my work' --store s3://b/s"),
        ("loa export --work there", " --variant audioldm2-ljs --tiny"),
        ("loa variants NAME", " --tiny --set vae.channels=8"),
        ("loa evaluate --name", ""),
        ("loa preprocess", ""),
        ("loa sing", ""),
    ],
)
def test_commands_in_messages_repeat_the_options_of_their_call(command: str, expected: str) -> None:
    assert cli.again(command) == command  # outside a call
    assert answer([*GIVEN, "--store", "s3://b/s"], lambda: cli.again(command)) == command + expected
    assert answer([], lambda: cli.again(command)) == command

    def fail() -> str:
        raise UserError(f"not here; run `{command}` first")

    text = answer([*GIVEN, "--store", "s3://b/s"], fail)
    assert text == f"Error: not here; run `{command}{expected}` first"


def test_commands_repeat_the_system_that_a_call_found_by_itself() -> None:
    def say() -> str:
        cli.works_on("audioldm2-ac-tiny", "elsewhere")
        cli.works_on("audioldm2-ac-tiny")
        return cli.again("loa train vae")

    assert answer([], say) == "loa train vae --work elsewhere --variant audioldm2-ac --tiny"


def test_each_step_ends_with_the_next() -> None:
    def walk(speech: bool, *arguments: str) -> list[str]:
        done = ["ingest"]
        while done[-1] != "serve":
            line = answer(list(arguments), lambda: cli.next_step(done[-1], speech))
            found = re.fullmatch(r"next: loa ((?:preprocess |train )?\w+)(.*)", line)
            assert found, line
            done.append(found[1])
        return done

    stages = [step.removeprefix("train ") for step in walk(False, "--tiny") if step.startswith("train ")]
    assert sorted(stages) == sorted(STAGES)
    assert walk(False)[-6:] == ["export", "evaluate", "report", "compare", "generate", "serve"]
    assert "preprocess speech" in walk(True) and "preprocess text" not in walk(True)
    assert answer(["--work", "w", "--tiny"], lambda: cli.next_step("preprocess mel")) == "next: loa train clap --work w --tiny"
    assert answer(["--work", "my w"], lambda: cli.next_step("evaluate")) == "next: loa report --work 'my w'"
    assert answer(["--work", "my w"], lambda: cli.next_step("report")) == "next: loa compare 'my w'"


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
    values = eval(result.output, {"Place": Place})
    assert values["settings"] == {"diffusion.condition_dropout": "0.2", "a": "b=c"}
    assert values["released"] == {"clap": "weights/clap"}
    assert (values["work"], values["variant"], values["tracking_uri"]) == (Place.of(cli.DEFAULT_WORK), cli.DEFAULT_VARIANT, None)


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
