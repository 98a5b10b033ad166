"""Options that several commands take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch


class Align(StrEnum):
    """How neurons are aligned before they are averaged."""

    hungarian = "hungarian"
    none = "none"


class Anchor(StrEnum):
    """The block of a group that the others are aligned to."""

    first = "first"
    middle = "middle"
    last = "last"


class Format(StrEnum):
    """How a checkpoint is stored."""

    dense = "dense"
    compact = "compact"


class SaveDtype(StrEnum):
    """What the weights of a checkpoint are saved in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def dtype_of(wanted: SaveDtype | None) -> torch.dtype | None:
    """Return torch's dtype; None where weights are saved in the one they came in."""
    from layerfold.checkpoint.weights import DTYPES

    return None if wanted is None else DTYPES[wanted.value]


class Form(StrEnum):
    """What a checkpoint can be rewritten as."""

    dense = "dense"
    compact = "compact"
    peft = "peft"


class Part(StrEnum):
    """What of a block is dropped."""

    block = "block"
    attention = "attention"
    ffn = "ffn"


class Criterion(StrEnum):
    """What says which weights go."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    taylor = "taylor"
    published = "published"


class Structure(StrEnum):
    """What pattern the zeros have, or whether whole neurons go, and heads."""

    unstructured = "unstructured"
    two_of_four = "2:4"
    neurons = "neurons"
    neurons_and_heads = "neurons+heads"


class Scope(StrEnum):
    """Where the lowest are chosen."""

    everywhere = "global"
    matrix = "matrix"
    row = "row"


class Base(StrEnum):
    """What blocks that share an FFN share."""

    anchor = "anchor"
    mean = "mean"
    fitted = "fitted"


class Init(StrEnum):
    """How the deltas begin."""

    data_svd = "data-svd"
    svd = "svd"
    zero = "zero"


class Ranks(StrEnum):
    """How ranks are given to deltas."""

    uniform = "uniform"
    allotted = "allotted"


class Level(StrEnum):
    """How what a method breaks is put right without training."""

    none = "none"
    rescale = "rescale"
    refit = "refit"
    refit_attention = "refit+attention"


class Preset(StrEnum):
    """Recipes that come with layerfold."""

    default = "default"
    full = "full"


class ProtocolName(StrEnum):
    """How figures are measured."""

    sound = "sound"
    published = "published"


ModelName = Annotated[str, typer.Option("--model", help="pocket, a checkpoint folder, a .gguf file or a Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="Folder to write; new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something, whole.")]
FormatName = Annotated[Format, typer.Option("--format", help="dense loads anywhere; compact stores each tensor once.")]
SaveDtypeName = Annotated[
    SaveDtype | None, typer.Option("--save-dtype", help="Of the saved weights; by default the one they came in.")
]
GroupSize = Annotated[int | None, typer.Option("--n", help="Blocks a group, from block 0; 2 to the depth.")]
Groups = Annotated[
    str | None,
    typer.Option(
        help="Instead of --n: first-last block of each group, as 1-4,5-8. Or auto, by a search, leaving as many as "
        "groups of --n (by default 2) would."
    ),
]
AlignName = Annotated[Align, typer.Option(help="How neurons are aligned.")]
AnchorName = Annotated[Anchor, typer.Option(help="The block of each group that the others are aligned to.")]
Blocks = Annotated[str | None, typer.Option(help="Blocks by index, from 0, as 1,3 or 2-4.")]
DrawnCount = Annotated[int | None, typer.Option("--random", help="Instead of --blocks: how many to draw.")]
DrawnFraction = Annotated[
    float | None, typer.Option("--fraction", help="Instead of --blocks: what share of the depth to draw.")
]
EveryBlock = Annotated[
    int | None, typer.Option("--every", help="Instead of --blocks: all but blocks 0, EVERY, 2 * EVERY ...")
]
DrawSeed = Annotated[int, typer.Option("--seed", help="Seed of the draw.")]
PartName = Annotated[Part, typer.Option(help="The blocks themselves, or only their attention or FFN.")]
NonZero = Annotated[
    str | None, typer.Option("--nonzero", help="Budget of non-zero parameters for the whole model: 104.69M, or 84.13%.")
]
Sparsity = Annotated[float | None, typer.Option(help="Instead of --nonzero: share of the prunable weights, as 0.3.")]
CriterionName = Annotated[Criterion, typer.Option(help="What goes; wanda, sparsegpt and taylor read calibration text.")]
StructureName = Annotated[
    Structure, typer.Option(help="Single weights, two of every four, or whole FFN neurons, with or without heads.")
]
ScopeName = Annotated[
    Scope | None, typer.Option(help="Where the lowest are chosen; by default as the criterion was published.")
]
Parts = Annotated[str, typer.Option(help="Which matrices: of attention, ffn, embeddings and head.")]
Rank = Annotated[int, typer.Option(help="Of the deltas; 0 shares without any.")]
BaseName = Annotated[
    Base, typer.Option(help="What is shared: the anchor's FFN, the mean, or one fitted with the deltas.")
]
InitName = Annotated[
    Init, typer.Option(help="Deltas that fit the outputs on calibration text, that fit the weights, or zero.")
]
RanksName = Annotated[Ranks, typer.Option(help="The same rank for all, or allotted by the singular values.")]
CalibrationCorpus = Annotated[
    str | None, typer.Option("--corpus", help="Calibration text; by default the model's own.")
]
CalibrationTokens = Annotated[int, typer.Option("--tokens", help="Calibration tokens.")]
RepairLevel = Annotated[
    Level, typer.Option("--repair", help="Without training: restore neurons' statistics, or solve for output matrices.")
]
RepairTokens = Annotated[int, typer.Option("--repair-tokens", help="Calibration tokens that a repair is fitted to.")]
Seed = Annotated[int, typer.Option(help="Orders the calibration documents.")]
RecipeFile = Annotated[Path | None, typer.Argument(help="A YAML file; by default the published comparison.")]
PresetName = Annotated[
    Preset | None, typer.Option("--preset", help="In place of a file; full adds recovery and tasks.")
]
BaseModel = Annotated[str | None, typer.Option("--model", help="Takes the place of the recipe's base.")]
RunFolder = Annotated[Path | None, typer.Option("--output-dir", help="The run's folder; a study in it goes on.")]
KeepOthers = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
