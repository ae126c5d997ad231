"""JOB: what each variant is, and what training it takes: sizes, memory, storage, hours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from friendly import friendly
from options import again, set_option, tiny_option
from pipelines.tables import aligned
from stages import STAGES
from stages.config import to_dict

if TYPE_CHECKING:
    from stages.variants import Variant


def describe(variant: Variant, stage: str | None = None, workers: int | None = None) -> str:
    """The resolved configuration with counts and estimates, as text."""
    from stages.sizes import ASSUMED_FLOPS, clip_bytes, costs, forward_flops, networks, parameters

    config = to_dict(variant)
    recipes = config["recipes"] if stage is None else {stage: config["recipes"][stage]}
    nets, flops, sizes = networks(variant), forward_flops(variant), clip_bytes(variant)
    workers = workers or 1
    chosen = [stage] if stage else [s for s in STAGES if s in flops or s == "joint"]
    total = sum(sizes.values()) / 1e3
    return "\n".join(
        [
            f"variant {variant.name}: {variant.summary}",
            "",
            json.dumps({k: v for k, v in config.items() if k != "recipes"} | {"recipes": recipes}, indent=2),
            "",
            "parameters",
            aligned([[name, f"{parameters(net):,}"] for name, net in nets.items()], indent="  "),
            "",
            f"training, {workers} worker{'s' if workers > 1 else ''} (hours assume {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s sustained each)",
            aligned([row for name in chosen for row in costs(name, variant, nets, flops, workers)], indent="  "),
            "",
            f"storage per clip of {variant.audio.clip_seconds} s: {total:,.0f} kB, a million clips {total:,.0f} GB",
            aligned([[name, f"{size / 1e3:,.1f} kB"] for name, size in sizes.items()], indent="  "),
        ]
    )


@click.command()
@click.argument("name", required=False)
@tiny_option
@set_option
@friendly
def main(name: str | None, tiny: bool, settings: dict[str, str]) -> None:
    """List the variants, or show one in full: configuration, parameters, memory, storage, hours."""
    from stages.sizes import networks, parameters
    from stages.variants import VARIANTS, resolve

    if name:
        click.echo(describe(resolve(name, tiny, settings)))
        return
    rows = [["variant", "T-UNet", "translator", "λ", "what it is"]]
    for each in VARIANTS:
        variant = resolve(each, tiny, settings)
        nets = networks(variant)
        counts = [f"{parameters(nets[part]):,}" for part in ("diffusion", "translator")]
        rows.append([variant.name, *counts, str(variant.translator.pooling), variant.summary])
    click.echo(aligned(rows, remarks=1))
    click.echo(f"\nnext: {again('loa variants NAME')} for one in full, or {again('loa ingest DIR --variant NAME')}")


if __name__ == "__main__":
    main()
