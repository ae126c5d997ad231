"""The `loa` command: one subcommand per job, each the same code as `python -m pipelines.<job>`.

A job's module is imported only when its command is chosen: `loa --help` and shell completion stay quick.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem, get_completion_class

__version__ = "0.1.0"


class Job(NamedTuple):
    target: str  # module:command
    summary: str


# In the order of a first visit. The summaries stand here because the modules are not imported to ask them.
JOURNEY: dict[str, dict[str, Job]] = {
    "Start here": {
        "demo": Job("pipelines.demo:main", "Run the whole pipeline on a small corpus, from recordings to sound."),
        "variants": Job("pipelines.variants:main", "List the systems that can be built, with their sizes and costs."),
    },
    "From recordings to features": {
        "plan": Job("pipelines.plan:main", "Say what features of so many hours take: clips, bytes, hours, from measured rates."),
        "ingest": Job("pipelines.ingest:main", "Make one validated clip table from corpora or a folder of recordings."),
        "validate": Job("pipelines.validate:main", "Check a folder of recordings or a feature store, without writing anything."),
        "preprocess": Job("pipelines.preprocess:main", "Compute mel, loa, latent, text or speech features of the clips."),
    },
    "From features to a system": {
        "import": Job(
            "pipelines.import_weights:main", "Import public weights: diffusers folders, the authors' checkpoints, CLAP, AudioMAE."
        ),
        "selfcheck": Job("pipelines.selfcheck:main", "Check weights: parameter counts, a generated sound, a training step of every part."),
        "train": Job("pipelines.train:main", "Train one stage of a variant on this machine or a cluster."),
        "finetune": Job("pipelines.finetune:main", "Finetune a bundle on your own recordings, by LoRA adapters or whole."),
        "export": Job("pipelines.export:main", "Assemble the trained stages into a bundle that diffusers can load, too."),
        "judges": Job("pipelines.judges:main", "Check the public weights of the networks for FAD, FD, IS and KL."),
        "evaluate": Job("pipelines.evaluate:main", "Generate for held-out captions, and score the clips."),
        "score": Job("pipelines.score:main", "Score a folder of clips from any system, beside a folder of real clips."),
        "compare": Job("pipelines.compare:main", "Compare scored systems with each other and with published numbers."),
        "status": Job(
            "pipelines.status:main", "Say how far a project is: its series, and each stage running, stopped, finished or out of date."
        ),
        "clean": Job("pipelines.clean:main", "List what a project no longer needs, with sizes, and remove it when told to."),
        "report": Job("pipelines.report:main", "Write one page about a project: scores, sounds, curves, costs."),
    },
    "From a bundle to sound": {
        "generate": Job("serving.generate:main", "Generate the sound of a prompt as a WAV file."),
        "serve": Job("serving.app:main", "Serve a bundle over HTTP, with a page to try it."),
    },
}
JOBS = {name: job for jobs in JOURNEY.values() for name, job in jobs.items()}


class Commands(click.Group):
    """A group that knows its commands by name and imports the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*JOBS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in JOBS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = JOBS[cmd_name].target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        given, names = args[0], self.list_commands(ctx)
        if given not in names and not given.startswith("-"):
            near = difflib.get_close_matches(given, names, 3, 0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
            ctx.fail(f"No such command {given!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, jobs in JOURNEY.items():
            with formatter.section(heading):
                formatter.write_dl([(name, job.summary) for name, job in jobs.items()])
        with formatter.section("This command"):
            formatter.write_dl([(name, command.get_short_help_str()) for name, command in self.commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        jobs = [CompletionItem(name, help=job.summary) for name, job in JOBS.items() if name.startswith(incomplete)]
        own = [CompletionItem(n, help=c.get_short_help_str()) for n, c in self.commands.items() if n.startswith(incomplete)]
        return jobs + own + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="loa")
def main() -> None:
    """loa trains every stage of AudioLDM 2 from recordings, and serves the result.

    New here? `loa demo` runs the whole pipeline in minutes. Then, on recordings of your own:

    \b
      loa ingest DIR            one table of clips
      loa preprocess mel        features, pass by pass
      loa train vae             the stages, one after the other
      loa export                a bundle
      loa generate "rain on a tin roof" -o rain.wav

    Every command has its own help, such as `loa train --help`.
    """


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script.

    Loaded from the shell's start-up file, it completes commands, options and variants:

    \b
      bash:  loa completion bash >> ~/.bashrc
      zsh:   loa completion zsh >> ~/.zshrc
      fish:  loa completion fish > ~/.config/fish/completions/loa.fish
    """
    script: Any = get_completion_class(shell)
    click.echo(script(main, {}, "loa", "_LOA_COMPLETE").source())


if __name__ == "__main__":
    main(prog_name="loa")
