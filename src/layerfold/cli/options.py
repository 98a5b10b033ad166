"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

# The same as in the modules that read them, which import torch.
Format = Literal["dense", "compact"]
SaveDtype = Literal["float32", "bfloat16", "float16"]
Form = Literal["dense", "compact", "peft", "gguf"]
Level = Literal["none", "rescale", "refit", "refit+attention"]
Preset = Literal["demo", "published", "full"]
Protocols = Literal["sound", "published"]
Offload = Literal["auto", "never", "always"]

MODEL = "pocket, a checkpoint folder, a .gguf file or a Hub id."

ModelName = Annotated[str, typer.Option(help=MODEL)]
ModelArgument = Annotated[str, typer.Argument(help=MODEL)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one.")
]
DtypeName = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU, else the checkpoint's own."
    ),
]
OffloadName = Annotated[
    Offload | None,
    typer.Option("--offload", help="Keep weights in temporary files; auto does so only if memory is too small."),
]
PLACES = {"device": DeviceName, "dtype": DtypeName, "offload": OffloadName}
"""What every command takes that computes: see `environment.placed`."""
OutputDir = Annotated[Path, typer.Option(help="New or empty folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the whole folder where it is not empty.")]
FormatName = Annotated[Format, typer.Option(help="dense loads anywhere; compact stores each tensor once.")]
SaveDtypeName = Annotated[
    SaveDtype | None, typer.Option(help="Type of the saved weights; by default the one they came in.")
]
CalibrationCorpus = Annotated[str | None, typer.Option(help="Calibration text; by default the model's own.")]
CalibrationTokens = Annotated[int, typer.Option(help="Calibration tokens.")]
RepairLevel = Annotated[Level, typer.Option(help="Repair without training: neurons' statistics, or output matrices.")]
RepairTokens = Annotated[int, typer.Option(help="Calibration tokens that a repair is fitted to.")]
Seed = Annotated[int, typer.Option(help="Orders the calibration documents.")]
RecipeFile = Annotated[Path | None, typer.Argument(help="A YAML file; by default the demo preset.")]
PresetName = Annotated[
    Preset | None,
    typer.Option(
        help="Instead of a file. demo: minutes; published: the published rows; full: trained, and with tasks."
    ),
]
BaseModel = Annotated[str | None, typer.Option(help="Replaces the recipe's base.")]
RunFolder = Annotated[Path | None, typer.Option(help="Folder of the run, which continues where it stopped.")]
KeepOthers = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def dtype_of(wanted: SaveDtype | None) -> torch.dtype | None:
    """Return torch's dtype; None saves weights in the dtype they came in."""
    from layerfold.environment import DTYPES

    return None if wanted is None else DTYPES[wanted]
