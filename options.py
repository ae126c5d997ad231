"""What the commands share: options with one meaning everywhere, the commands that messages name, and checks of the machine.

A job's command is built as

    @click.command()
    @work_option
    @variant_option
    @friendly
    def main(work: Place, variant: str) -> None: ...

Neither this file nor a command's file imports torch, pyarrow and their like at its top: `--help`, completion and a mistyped
option answer at once. A command imports what does the work where the work begins.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import psutil
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from stages.config import TINY
from stages.errors import UserError
from stages.sampling import CHOICES, OPTIONS, PROFILES

if TYPE_CHECKING:
    from stages.files import Place

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_WORK = "outputs"
DEFAULT_VARIANT = "audioldm2-full"


# --------------------------------------------------------------------------------------------------- shared options


def pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE given several times, as a dict."""
    pairs: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        key, value = key.strip(), value.strip()
        if not (key and equals and value):
            raise click.BadParameter(f"{text!r} is not of the form {parameter.make_metavar(context)}")
        if key in pairs:
            raise click.BadParameter(f"{key} is given twice: {pairs[key]!r} and {value!r}")
        pairs[key] = value
    return pairs


class PlaceType(click.ParamType):
    """A folder as a path or a URL; arrives as `stages.files.Place`, which makes no local folder of a URL."""

    name = "place"

    def __init__(self, exists: bool = False, file_okay: bool = False) -> None:
        self.exists, self.file_okay = exists, file_okay

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        from stages.files import Place

        try:
            place = Place.of(value)
        except UserError as error:
            self.fail(str(error), param, ctx)
        if place.local and not self.file_okay and os.path.isfile(place.url):
            self.fail(f"Directory {str(value)!r} is a file.", param, ctx)
        if place.local and self.exists and not place.exists():  # a URL is looked at where errors are sentences
            self.fail(f"Path {str(value)!r} does not exist.", param, ctx)
        return place

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


def _variant_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from stages.variants import VARIANTS

    return [CompletionItem(name) for name in VARIANTS if name.startswith(incomplete)]


work_option = click.option(
    "--work",
    type=PlaceType(),
    default=DEFAULT_WORK,
    show_default=True,
    envvar="LOA_WORK",
    metavar="DIR",
    help="Project folder with feature store, stages, runs and bundle, or its URL (s3://…). On a cluster, one that all nodes reach.",
)
variant_option = click.option(
    "--variant",
    default=DEFAULT_VARIANT,
    show_default=True,
    metavar="NAME",
    shell_complete=_variant_names,
    help="Which system to build; `loa variants` lists them.",
)
tiny_option = click.option("--tiny", is_flag=True, help="Use the tiny configuration of the variant, for laptops and tests.")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="Override a single setting of the variant, such as recipes.diffusion.learning_rate=5e-5. May be repeated.  [default: none]",
)
with_option = click.option(
    "--with",
    "released",
    multiple=True,
    callback=pairs,
    metavar="STAGE=FOLDER",
    help="Use these weights for a stage: a folder or a hub id. May be repeated.  [default: the ones trained in --work]",
)
tracking_option = click.option(
    "--tracking-uri",
    envvar="MLFLOW_TRACKING_URI",
    metavar="URI",
    help="MLflow server or database to log to.  [default: mlflow.db in --work]",
)


@dataclass(frozen=True)
class Reservation:
    """What one worker of a job reserves of its node; None where nothing is said of it.

    Attributes:
        cpus: CPUs; encoders use as many threads.
        gpus: GPUs, or a share of one.
        memory: bytes.
    """

    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None

    def over(self, default: Reservation) -> Reservation:
        """This one, and `default` for what it leaves open."""
        return replace(default, **{name: value for name, value in vars(self).items() if value is not None})


AS_NEEDED = Reservation()  # by the job
WorkerRange = int | tuple[int, int] | None  # so many, or from the smallest to the largest number; None: nothing said


def in_this_process(workers: WorkerRange) -> bool:
    """Whether `--workers 0` was given: no Ray."""
    return workers in (0, (0, 0))


class _WorkersType(click.ParamType):
    """N or MIN-MAX, as a pair."""

    name = "MIN-MAX"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, dash, high = str(value).strip().partition("-")
        if not (low.isdecimal() and (high.isdecimal() if dash else not high)):
            self.fail(f"{value!r} is neither a number of workers nor a range such as 1-16", parameter, context)
        smallest, largest = int(low), int(high or low)
        if largest < smallest or (dash and not smallest):
            self.fail(f"{value!r} is no range: write the smaller number first, at least 1", parameter, context)
        return smallest, largest


def _gpus(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and value > 1 and value != int(value):
        raise click.BadParameter(f"{value:g} is neither a whole number of GPUs nor a share of one")
    return value


def worker_options(function: Function) -> Function:
    """`--workers --cpu --gpu --memory`: the workers of a job on Ray, in the same words for every command.

    They arrive as two arguments: `workers`, a pair of the smallest and largest number, (0, 0) for this process without Ray, or
    None; and `reserve`, a Reservation.
    """

    @functools.wraps(function)
    def given(*args: Any, cpu: float | None, gpu: float | None, memory: float | None, **kwargs: Any) -> Any:
        return function(*args, reserve=Reservation(cpu, gpu, None if memory is None else int(memory * 1e9)), **kwargs)

    command: Any = given
    positive = click.FloatRange(min=0, min_open=True)
    for option in reversed(
        (
            click.option(
                "--workers",
                type=_WorkersType(),
                help="Workers at once: N, or from MIN up to MAX as the cluster has room; 0 works in this process, without Ray.  "
                "[default: as many as there is work and room for; training: one per GPU, or one]",
            ),
            click.option("--cpu", type=positive, metavar="N", help="CPUs that each worker reserves.  [default: what the job needs]"),
            click.option(
                "--gpu",
                type=click.FloatRange(min=0),
                callback=_gpus,
                metavar="N",
                help="GPUs that each worker reserves; 0 does without, 0.5 shares one.  [default: what the job needs]",
            ),
            click.option(
                "--memory", type=positive, metavar="GB", help="Memory that each worker reserves, in GB.  [default: what the job needs]"
            ),
        )
    ):
        command = option(command)
    return cast(Function, command)


_SAMPLING: dict[str, Any] = {
    "num_inference_steps": (("--steps",), click.IntRange(1), "Number of denoising steps; more are slower and sound better."),
    "guidance_scale": ((), float, "Classifier-free guidance scale; 1 means no guidance."),
    "scheduler": ((), click.Choice(CHOICES["scheduler"]), "Sampler."),
    "eta": ((), float, "Noise added per step, 0 to 1; ddim only."),
    "timesteps": ((), click.Choice(CHOICES["timesteps"]), "Timestep spacing when --steps does not divide 1000."),
    "unconditional": (
        (),
        click.Choice(CHOICES["unconditional"]),
        "Unconditional input of guidance: zeros, or GPT-2's LOA of the empty prompt.",
    ),
    "padding": ((), click.Choice(CHOICES["padding"]), "Pad each prompt on its own, or all to the longest of the batch."),
    "length": ((), click.Choice(CHOICES["length"]), "Rule for the number of frames and samples of --seconds."),
    "candidates": ((), click.IntRange(1), "Generate this many per prompt and keep those with the best CLAP score."),
}


def sampling_options(*left_out: str) -> Callable[[Function], Function]:
    """Options for all of `stages.sampling.resolve`, save those `left_out`.

    What was given arrives as one argument, `sampling`, a dict for `resolve`.
    """
    names = [name for name in ("profile", *OPTIONS) if name not in left_out]

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in names}
            return function(*args, sampling={name: value for name, value in given.items() if value is not None}, **kwargs)

        decorated: Any = command
        for name in reversed(OPTIONS):
            if name in names:
                flags, kind, text = _SAMPLING[name]
                default = getattr(PROFILES["loa"], name)
                text += f"  [default: {'as the bundle was trained' if default is None else default}, or the value of --profile]"
                decorated = click.option(*(flags or (f"--{name.replace('_', '-')}",)), name, type=kind, help=text)(decorated)
        whose = "Sampling settings: loa's, or those of diffusers or the authors; the options below override single settings."
        decorated = click.option("--profile", type=click.Choice(list(PROFILES)), default="loa", show_default=True, help=whose)(decorated)
        return cast(Function, decorated)

    return decorate


def shown(path: Path | str | Place) -> str:
    """A path as people write it: relative to where they are if it lies there or next to it, else whole; a URL as it is."""
    if "://" in str(path):
        return str(path)
    path = str(path)
    relative = os.path.relpath(path)
    return path if relative.startswith(os.path.join(os.pardir, os.pardir)) else relative


# ---------------------------------------------------------------------------------------- commands that messages name

# The README's steps, in order; {work} is an argument there.
STEPS = (
    "ingest",
    "preprocess mel",
    "train clap",
    "train audiomae",
    "train vae",
    "train vocoder",
    "train classifier",
    "preprocess loa",
    "preprocess latent",
    "preprocess text",
    "preprocess speech",
    "train translator",
    "train diffusion",
    "train joint",
    "export",
    "evaluate",
    "report",
    "compare {work}",
    'generate "rain on a tin roof"',
    "serve",
)
NOT_FOR_SPEECH = ("train classifier", "preprocess text")
REPEATED = ("--work", "--store", "--bundle", "--variant", "--tiny", "--set")
_SYSTEM = "loa.system"  # in click's context: options that stand for the system a command works on


def next_step(done: str, speech: bool = False) -> str:
    """The line that ends a command: the step of `STEPS` after `done`, with the options of this call."""
    left_out = NOT_FOR_SPEECH if speech else ("preprocess speech",)
    steps = [step for step in STEPS if step not in left_out or step == done]
    context = click.get_current_context(silent=True)
    work = context.params.get("work") if context else None
    names = [step.partition(" {")[0].partition(' "')[0] for step in steps]
    step = steps[names.index(done) + 1].format(work=shlex.quote(shown(work or DEFAULT_WORK)))
    return f"next: {again(f'loa {step}')}"


def complete(sentence: str) -> str:
    """A message in which every command in backquotes has the options of the call it answers."""
    return re.sub(r"`(loa [^`]+)`", lambda match: f"`{again(match[1])}`", sentence)


def again(command: str) -> str:
    """`command` with those options of this call that it has, too, so that it can be pasted; as it is outside a call."""
    context = click.get_current_context(silent=True)
    if context is None or command.split()[-1].startswith("-"):
        return command
    known, words = _options_of(command), command.split()
    return " ".join([command, *(text for flag, text in _given(context) if flag in known and flag not in words)])


def works_on(variant: str, work: Path | str | Place | None = None) -> None:
    """Let the commands that messages name repeat a variant (and work folder) that is not among this call's options."""
    context = click.get_current_context(silent=True)
    if context is None:
        return
    name = variant.removesuffix(TINY)
    system = context.meta.setdefault(_SYSTEM, {})
    if work is not None:
        system["--work"] = f"--work {shlex.quote(shown(work))}"
    if name != DEFAULT_VARIANT:
        system["--variant"] = f"--variant {name}"
    if name != variant:
        system["--tiny"] = "--tiny"


def _given(context: click.Context) -> list[tuple[str, str]]:
    """Options of this call that other commands repeat: (flag, text)."""
    given: list[tuple[str, str]] = list(context.meta.get(_SYSTEM, {}).items())
    for parameter in context.command.params:
        flag, name = parameter.opts[0], str(parameter.name)
        if flag not in REPEATED or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or flag in dict(given):
            continue
        value = context.params[name]
        if isinstance(value, dict):  # --set: a recipe belongs to one stage, all else to the system
            values = [f"{key}={text}" for key, text in value.items() if not key.startswith("recipes.")]
        else:
            values = [shown(value) if isinstance(parameter.type, PlaceType | click.Path) else str(value)]
        given += [(flag, flag if value is True else f"{flag} {shlex.quote(text)}") for text in values]
    return given


def _options_of(command: str) -> set[str]:
    """Long options of the command that begins with these words; none if there is no such command."""
    import loa  # only now: it names this file's users

    context = click.Context(loa.main)
    inner_command: click.Command = loa.main
    for word in command.split()[1:]:
        if isinstance(inner_command, click.Group) and (inner := inner_command.get_command(context, word)) is not None:
            inner_command = inner
    return {flag for parameter in inner_command.params for flag in parameter.opts}


# ------------------------------------------------------------------------------------------ is there room for this?


def require_disk(path: Path | str, gigabytes: float) -> None:
    """Refuse when the disk that will hold `path` has less than `gigabytes` (10^9 bytes) free.

    Folders on an object store (`scheme://…`) are taken to have room.
    """
    if "://" in str(path):
        return
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise UserError(
            f"{path} needs about {gigabytes:.1f} GB of disk and {free:.1f} GB are free; free some or choose another folder with --work"
        )


def require_memory(gigabytes: float) -> None:
    """Refuse when less than `gigabytes` (10^9 bytes) of memory are available to this process."""
    free = available_memory() / 1e9
    if free < gigabytes:
        raise UserError(
            f"this needs about {gigabytes:.1f} GB of memory and {free:.1f} GB are available; "
            "close other programs, or use a machine or container with more"
        )


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory this process may still take: the machine's, or its container's where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((cgroup / "memory.current").read_text())
        cache = next(int(line.split()[1]) for line in (cgroup / "memory.stat").open() if line.startswith("inactive_file "))
    except (OSError, StopIteration):  # no cgroup v2 here: the machine's figure is the one there is
        return free
    return min(free, max(0, int(limit) - used + cache))
