"""Size: distinct parameters, non-zero weights, bytes on disk, operations per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import bytes_on_disk
from layerfold.checkpoint.weights import dtype_name
from layerfold.evaluators.base import Evaluator, Score
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.settings import check_least


@dataclass(frozen=True)
class Size(Evaluator):
    """Number of distinct parameters, where a tied tensor counts once; exact, so that its interval is the value.

    Attributes:
        context: number of tokens that attention is counted for; None takes the model's maximum, 2,048 at most.
    """

    context: int | None = None
    name: ClassVar[str] = "size"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_least(self, "size", context=1)

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        return {"context": self.context or model.decoder.default_context, "dtype": dtype_name(model.saved_dtype)}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Measure one model: count its weights, and write them to a temporary folder in both forms to weigh the files.

        The files are in the dtype that the model's checkpoint was in.
        """
        size, settings = model.decoder.size(), self.settings(model)
        details = {
            "parameters": size.parameters,
            "nonzero": size.nonzero,
            "bytes": bytes_on_disk(model.decoder, "dense", model.saved_dtype),
            "compact_bytes": bytes_on_disk(model.decoder, "compact", model.saved_dtype),
            "dtype": settings["dtype"],
            "computed_dtype": dtype_name(model.decoder.model.dtype),
            "blocks": model.decoder.n_blocks,
            "flops_per_token": flops_per_token(model.decoder, settings["context"]),
            "context": settings["context"],
        }
        return Score(
            size.parameters, size.parameters, size.parameters, "parameters", lower_is_better=True, details=details
        )


def flops_per_token(decoder: Decoder, context: int) -> int:
    """Forward operations for one token, averaged over the positions of a window of `context` tokens.

    A weight of a projection or of the LM head takes two. A channel of a query head takes four for each of the
    (context + 1) / 2 positions that a token attends to on average. Norms, activations and look-ups are not counted.
    """
    head = int(decoder.model.get_output_embeddings().weight.numel())
    matrices = sum(p.numel() for block in decoder.blocks for p in block.module.parameters() if p.ndim == 2)
    channels = sum(block.heads and block.attention.output.weight.shape[1] for block in decoder.blocks)
    return 2 * (head + matrices) + 2 * channels * (context + 1)
