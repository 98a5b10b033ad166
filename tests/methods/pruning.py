"""Pruning tiny models, and what is counted and compared of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny import base, reads, windows

from layerfold.calibration import Calibration
from layerfold.methods import Prune
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder, Projection

CUT = windows(limit_tokens=100)
SCOPES = ("global", "matrix", "row")
WAYS = [{"criterion": criterion, "scope": scope} for criterion in ("magnitude", "wanda") for scope in SCOPES]
WAYS += [{"criterion": "sparsegpt"}]
HEADS: dict[str, Any] = {"criterion": "taylor", "structure": "neurons+heads"}
NEURONS: dict[str, Any] = {"criterion": "taylor", "structure": "neurons"}
NARROW: list[dict[str, Any]] = [{"criterion": criterion} for criterion in ("magnitude", "wanda", "sparsegpt")]
NARROW += [{"criterion": criterion, "scope": "global"} for criterion in ("magnitude", "wanda")]
"""Ways to rate neurons, besides the loss."""
EVERY = [*WAYS, *({"structure": "neurons"} | way for way in NARROW), {"structure": "2:4", "criterion": "sparsegpt"}]
EVERY += [HEADS, NEURONS, NEURONS | {"scope": "global"}]
"""Every way to prune."""


def fresh(family: str, **settings: Any) -> Decoder:
    """A tiny decoder of the test's own, copied from one that is made once."""
    return base(family, **settings).copy()


def prune(decoder: Decoder, **changes: Any) -> Notes:
    method = Prune(**changes)
    return method.apply(decoder, Calibration(decoder, CUT) if method.needs_calibration else None)


def blocks(decoder: Decoder) -> list[Projection]:
    """The matrices of the blocks; one that several use once."""
    return list({id(each.matrix.module.weight): each for each in reversed(list(decoder.projections))}.values())[::-1]


def prunable(decoder: Decoder) -> tuple[int, int]:
    """How many weights the blocks' matrices have, and how many that are not zero."""
    found = [each.matrix.weight for each in blocks(decoder)]
    return sum(each.numel() for each in found), sum(int(each.count_nonzero()) for each in found)


def weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in decoder.model.named_parameters()}


def norms(decoder: Decoder) -> dict[str, np.ndarray]:
    """The 2-norms of what each projection reads, over all tokens."""
    return {name: np.linalg.norm(x, axis=0) for name, x in reads(decoder, CUT).items()}
