"""Size: distinct parameters, non-zeros, bytes on disk, operations a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import bytes_on_disk
from layerfold.checkpoint.weights import dtype_name
from layerfold.errors import InputError
from layerfold.evaluators.base import Evaluator, Score
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress


@dataclass(frozen=True)
class Size(Evaluator):
    """Distinct parameters: a tied tensor counts once. Exact, so its interval is the value.

    Attributes:
        context: for the operations of attention; None takes the model's maximum, 2,048 at most.
    """

    context: int | None = None
    name: ClassVar[str] = "size"

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise InputError(f"size context {self.context}; accepted: 1 or more")

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol."""
        return "size-2"

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        return {"context": self.context or model.decoder.default_context, "dtype": dtype_name(model.saved_dtype)}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Measure one model; its weights are written to a temporary folder, in both forms, and weighed.

        They are written in the dtype that they came in, as a checkpoint is.
        """
        size = model.decoder.size()
        context = self.context or model.decoder.default_context
        details = {
            "parameters": size.parameters,
            "nonzero": size.nonzero,
            "bytes": bytes_on_disk(model.decoder, "dense", model.saved_dtype),
            "compact_bytes": bytes_on_disk(model.decoder, "compact", model.saved_dtype),
            "dtype": dtype_name(model.saved_dtype),
            "computed_dtype": dtype_name(model.decoder.model.dtype),
            "blocks": model.decoder.n_blocks,
            "flops_per_token": flops_per_token(model.decoder, context),
            "context": context,
        }
        return Score(
            size.parameters, size.parameters, size.parameters, "parameters", lower_is_better=True, details=details
        )


def flops_per_token(decoder: Decoder, context: int) -> int:
    """Forward operations for one token, averaged over the positions of a window of `context` tokens.

    Two for each weight of a projection or of the LM head, and four for each channel of each query head and each of
    the (context + 1) / 2 positions that a token attends to on average. Norms, activations and look-ups are left out.
    """
    head = int(decoder.model.get_output_embeddings().weight.numel())
    matrices = sum(p.numel() for block in decoder.blocks for p in block.module.parameters() if p.ndim == 2)
    channels = sum(block.heads and block.attention.output.weight.shape[1] for block in decoder.blocks)
    return 2 * (head + matrices) + 2 * channels * (context + 1)
