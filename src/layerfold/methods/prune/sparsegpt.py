"""Optimal brain surgery on one matrix: what to zero, and what the other weights become to make up for it.

For y = W x the error of a change D of W over calibration text is tr(D H D^T), H = E[x x^T], a quadratic form in each
row.
"""

from __future__ import annotations

import torch
from scipy.linalg.lapack import strtri
from torch import Tensor

from layerfold.maths.linalg import damped_factor
from layerfold.maths.ranking import lowest_in_rows, shares

_COLUMNS = 128
"""Columns whose weights are chosen at once, as published."""


@torch.no_grad()
def sparsify(weight: Tensor, moments: Tensor, zeros: int | None) -> tuple[Tensor, Tensor]:
    """Zero weights of a matrix column by column, each time letting the columns to the right make up for the error.

    Within 128 columns at a time (for 2:4, within four) those weights are chosen whose error w^2 / [U_jj]^2 is least, U
    the upper factor of H's inverse.

    Args:
        weight: (out, in).
        moments: H, (in, in).
        zeros: how many weights are to be zero, spread over the columns by how many are not zero yet; None for two of
            every four neighbours in a row (2:4). What is zero already counts, and stays zero.

    Returns:
        The new weights, and where they are kept, both (out, in).

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
    algorithm 1 and equations 3 to 7.
    """
    factor = _inverse_factor(moments)
    columns = weight.T.float().clone(memory_format=torch.contiguous_format)  # (in, out): a column in one piece
    empty = columns == 0
    kept = torch.ones_like(empty)
    pieces = range(0, len(columns), _COLUMNS)
    counts = None if zeros is None else _counts(empty, zeros)
    for number, start in enumerate(pieces):
        piece = slice(start, start + _COLUMNS)
        part, local, gone = columns[piece], factor[piece, piece], empty[piece]
        lost = gone.clone()  # what the columns before put there is an error too, which those after make up for
        if counts is not None:
            found = _scores(part, local.diagonal(), gone)
            lost |= lowest_in_rows(found.reshape(1, -1), counts[number : number + 1]).view_as(found)
        errors = torch.empty_like(part)
        for row in range(len(part)):
            if counts is None and row % 4 == 0:
                four = slice(row, row + 4)
                found = _scores(part[four], local.diagonal()[four], gone[four])
                lost[four] |= lowest_in_rows(found.T, torch.tensor(2)).T
            errors[row] = part[row].masked_fill(~lost[row], 0) / local[row, row]
            part[row:].addr_(local[row, row:], errors[row], alpha=-1)
        part.masked_fill_(lost, 0)
        kept[piece] = ~lost
        columns[piece.stop :].addmm_(factor[piece, piece.stop :].T, errors, alpha=-1)
    return columns.T, kept.T


def _scores(columns: Tensor, factors: Tensor, empty: Tensor) -> Tensor:
    """The error of zeroing each weight, (in, out), lowest where it was zero from the start."""
    return (columns / factors[:, None]).square_().masked_fill_(empty, -1)


def _counts(empty: Tensor, zeros: int) -> Tensor:
    """How many of each piece's weights are zeroed, those that are zero already among them."""
    done = torch.stack([piece.sum() for piece in empty.split(_COLUMNS)])
    sizes = torch.tensor([piece.numel() for piece in empty.split(_COLUMNS)], device=done.device)
    return done + shares(max(0, zeros - int(done.sum())), sizes - done)


@torch.no_grad()
def removal_errors(weight: Tensor, moments: Tensor) -> Tensor:
    """Return the least error of removing each input alone, (in,), if the other weights make up for it.

    Args:
        weight: (out, in).
        moments: H, (in, in).

    Source: Hassibi and Stork, "Optimal brain surgeon", 1993, equation 5, summed over the outputs.
    """
    return weight.float().square().sum(0) / _inverse_factor(moments).square().sum(0)


@torch.no_grad()
def refitted(weight: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """Return the weights of the inputs that are kept, (out, kept), that come closest to what all inputs gave.

    Damped towards what they were, so that the error never rises.

    Args:
        weight: (out, in).
        moments: H, (in, in).
        kept: (kept,) indices.
    """
    lost = torch.ones_like(moments[0], dtype=torch.bool).index_fill_(0, kept, False)
    chosen, columns = moments[kept], weight.T.float()
    made_up = torch.cholesky_solve(chosen[:, lost] @ columns[lost], damped_factor(chosen[:, kept]))
    return (columns[kept] + made_up).T


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper U with H^-1 = U^T U: the inverse of the upper R with H = R R^T, so that H is never inverted."""
    # The transpose of R, flipped, is what Cholesky gives; LAPACK's own inverse of a triangle takes a third of a solve.
    upper = damped_factor(moments.flip(0, 1)).flip(0, 1)
    if upper.device.type != "cpu":
        identity = torch.eye(len(upper), device=upper.device)
        found: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return found
    inverse, _ = strtri(upper.numpy().T, lower=1)
    return torch.from_numpy(inverse).T
