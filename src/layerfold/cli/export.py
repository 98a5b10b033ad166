"""`layerfold export`: a checkpoint in another form; `layerfold check`: what reads a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerfold.cli import options
from layerfold.cli.console import print_json
from layerfold.errors import InputError


def export(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    output_dir: options.OutputDir,
    to: Annotated[
        options.Form,
        typer.Option(
            "--to", help="dense or compact; peft: the deltas as a LoRA adapter, and its base; gguf: for llama.cpp."
        ),
    ],
    save_dtype: options.SaveDtypeName = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Rewrite a checkpoint in another form."""
    from layerfold import files
    from layerfold.checkpoint.load import load
    from layerfold.checkpoint.peft import check_adapter_folder, save_adapter

    if to == "gguf":
        _to_gguf(directory, output_dir, save_dtype, overwrite=overwrite)
        return
    if to == "peft":
        check_adapter_folder(output_dir, overwrite=overwrite)
    else:
        files.check_folder(output_dir, overwrite=overwrite)
    if not directory.is_dir():
        raise InputError(f"no checkpoint folder at {str(directory)!r}")
    model = load(directory, device="cpu", dtype="float32")  # nothing is computed but deltas multiplied out
    if to == "peft":
        save_adapter(model, output_dir, overwrite=overwrite, dtype=options.dtype_of(save_dtype))
        typer.echo(f"wrote {output_dir} (peft)")
    else:
        written = model.save(output_dir, format=to, overwrite=overwrite, dtype=options.dtype_of(save_dtype))
        size = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
        typer.echo(f"wrote {output_dir} ({written}, {size / 1e6:,.1f} MB)")


def _to_gguf(directory: Path, output: Path, save_dtype: str | None, *, overwrite: bool) -> None:
    """Write a GGUF file: the output itself where it is named so, else one in that folder."""
    import torch

    from layerfold.checkpoint.ggml import save_gguf
    from layerfold.checkpoint.load import load

    if not directory.is_dir():
        raise InputError(f"no checkpoint folder at {str(directory)!r}")
    file = output if output.suffix == ".gguf" else output / f"{directory.resolve().name}.gguf"
    model = load(directory, device="cpu", dtype="float32")
    dtype = save_dtype or ("float16" if model.saved_dtype == torch.float16 else "float32")  # neither rounds
    save_gguf(model, file, dtype, overwrite=overwrite)
    typer.echo(f"wrote {file} (gguf, {dtype}, {file.stat().st_size / 1e6:,.1f} MB)")


def check(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder.")], as_json: options.AsJson = False
) -> int:
    """Say which programs read a checkpoint. Status 1 where plain transformers should and does not."""
    from dataclasses import asdict

    from layerfold.checkpoint.check import check as checked

    found = checked(directory)
    if as_json:
        print_json(asdict(found))
    else:
        size = f"{found.bytes / 1e6:,.1f} MB of weights"
        typer.echo(f"{directory}: {found.format}, {found.parameters:,} distinct parameters, {size}")
        for reader in found.readers:
            typer.echo(f"{reader.name}: {reader.answer}: {reader.why}")
        for warning in found.warnings:
            typer.echo(f"warning: {warning}", err=True)
    return int(found.readers[0].answer == "differs" or (found.format == "dense" and "not" in found.readers[0].answer))
