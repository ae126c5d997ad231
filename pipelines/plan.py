"""JOB: what each variant is, and what training it takes: sizes, memory, storage, hours."""

from __future__ import annotations

import click

from options import again, friendly, set_option, tiny_option


@click.command()
@click.argument("name", required=False)
@tiny_option
@set_option
@friendly
def main(name: str | None, tiny: bool, settings: dict[str, str]) -> None:
    """List the variants, or show one in full: configuration, parameters, memory, storage, hours."""
    from stages.sizes import describe, networks, parameters
    from stages.variants import VARIANTS, resolve

    if name:
        click.echo(describe(resolve(name, tiny, settings)))
        return
    click.echo(f"{'variant':<30}{'T-UNet':>14}{'translator':>14}{'λ':>4}  what it is")
    for each in VARIANTS:
        variant = resolve(each, tiny, settings)
        nets = networks(variant)
        counts = f"{parameters(nets['diffusion']):>14,}{parameters(nets['translator']):>14,}"
        click.echo(f"{variant.name:<30}{counts}{variant.translator.pooling:>4}  {variant.summary}")
    click.echo(f"\nnext: {again('loa variants NAME')} for one in full, or {again('loa ingest DIR --variant NAME')}")


if __name__ == "__main__":
    main()
