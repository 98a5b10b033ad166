"""`layerfold push`: a checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder that layerfold wrote.")],
    repository: Annotated[str, typer.Argument(help="Where it goes: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "layerfold checkpoint",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and model card, and send nothing.")] = False,
) -> None:
    """Send a checkpoint and its model card to the Hub."""
    from layerfold.checkpoint import push as pushing

    upload = pushing.prepare(directory, repository)
    for name, size in upload.sizes.items():
        typer.echo(f"{size:>15,} bytes  {name}")
    if dry_run:
        typer.echo(f"\n{upload.card}")
        typer.echo(f"nothing was sent; without --dry-run it goes to {repository}")
        return
    address = pushing.push(upload, private=private, message=message)
    typer.echo(f"wrote {address}")
