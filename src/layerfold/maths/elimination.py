"""Backward elimination: which inputs of a regression matter least, when the others make up for each that goes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerfold.maths.linalg import damped

_DAMPING = 3e-3
"""Added to each input's mean square, as a share of it."""

_POOL = 4
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def eliminated(
    gram: Tensor, products: Tensor, start: Tensor, candidates: Tensor, width: int = 1, at_once: int = 1
) -> Tensor:
    """Order groups of inputs by the step in which they go: the first is missed least.

    In each step those groups go without which the regression of the outputs on the inputs that are left has the least
    error. It rises by tr(W_g (H^-1_gg)^-1 W_g^T) for a group g, where W are the weights of the regression, and H the
    moments of the inputs that are left.

    Args:
        gram: E[x x^T], (in, in).
        products: E[x y^T], (in, out).
        start: weights to which the regression is drawn a little, (out, in): where there are few rows they decide.
        candidates: the inputs that may go, (groups * width,), in order.
        width: inputs of a group.
        at_once: inputs that go before all errors are computed again; those go in turn, of four times as many.

    Returns:
        (groups,) indices.

    Source: Hassibi and Stork, "Optimal brain surgeon", 1993, equation 5; Kurtic et al., "ZipLM", 2023, equation 3, for
    groups.
    """
    damping = _DAMPING * gram.diagonal()
    inverse = torch.cholesky_inverse(damped(gram + torch.diag(damping), 1e-6)[1])
    weights = start + (products.T - start @ gram) @ inverse  # (out, in)
    groups = candidates.view(-1, width)
    left = torch.ones(len(groups), dtype=torch.bool, device=gram.device)
    order: list[Tensor] = []
    while left.any():
        alive = left.nonzero()[:, 0]
        errors = _errors(weights, inverse, groups[alive])
        pool = alive[errors.argsort(stable=True)[: _POOL * at_once if at_once > 1 else 1]]
        gone = pool[_in_turn(weights, inverse, groups[pool][:, 0], at_once)] if at_once > 1 else pool
        order.append(gone)
        left[gone] = False
        inputs = groups[gone].flatten()
        columns = inverse[:, inputs]
        solved = torch.linalg.lstsq(inverse[inputs][:, inputs].double(), columns.T.double()).solution.float()
        weights.addmm_(weights[:, inputs], solved, alpha=-1)
        inverse.addmm_(columns, solved, alpha=-1)
    return torch.cat(order)


def _in_turn(weights: Tensor, inverse: Tensor, inputs: Tensor, count: int) -> Tensor:
    """Return the places, among some inputs, of those that go one after the other, (count,).

    Each step changes the others' errors: of two inputs that stand in for each other only one can go.
    """
    chosen: list[int] = []
    read = weights[:, inputs].double()
    # Few and small steps, whose results are needed at once: on the processor, wherever the rest is.
    products, left = (each.cpu().numpy() for each in (read.T @ read, inverse[inputs][:, inputs].double()))
    for _ in range(min(count, len(inputs))):
        errors = np.diagonal(products) / np.maximum(np.diagonal(left), _TINY)
        errors[chosen] = np.inf
        place = int(errors.argmin())
        chosen.append(place)
        row = left[place] / left[place, place]
        own = np.outer(products[place], row)
        products = products - own - own.T + products[place, place] * np.outer(row, row)
        left = left - np.outer(left[place], row)
    return torch.tensor(chosen, device=inputs.device)


def _errors(weights: Tensor, inverse: Tensor, groups: Tensor) -> Tensor:
    """By how much the error rises without each group, (groups,)."""
    if groups.shape[1] == 1:
        inputs = groups[:, 0]
        errors: Tensor = weights[:, inputs].square().sum(0) / inverse.diagonal()[inputs].clamp_min(_TINY)
        return errors
    own = inverse[groups[:, :, None], groups[:, None, :]]
    each = weights[:, groups].permute(1, 2, 0)  # (groups, width, out)
    solved = torch.linalg.lstsq(own.double(), each.double()).solution
    found: Tensor = (each.double() * solved).sum((1, 2)).float()
    return found
