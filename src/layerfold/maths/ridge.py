"""Ridge regression from streamed moments: what a matrix's weights gain so that it makes up for an error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.maths.moments import SecondMoments
from layerfold.maths.precision import widest

RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Penalties, as multiples of each input's own mean square."""

_FIRST = (1, 4, 7)
"""Places of those that are tried first, before their best one's neighbours. They lie far apart, as what helps may too:
where a few inputs are much larger than the others, either may be what the error depends on."""

NOT_FINITE = "activations on the calibration text are not finite"


class RegressionMoments:
    """Accumulate what the weighted linear regression of targets on inputs needs, one batch of rows at a time.

    Holds (inputs, inputs) and (inputs, outputs) float32 whatever the number of rows.
    """

    def __init__(self) -> None:
        self._inputs = SecondMoments(whole=True)

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._inputs.count

    def update(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: inputs are (rows, d), targets (rows, out); weights, (rows,), are 1 if they are not given."""
        inputs, targets = inputs.float(), targets.float()
        roots = inputs.new_ones(len(inputs)) if weights is None else weights.sqrt()
        if not self.count:
            wide = widest(inputs.device)
            self._products = inputs.new_zeros(inputs.shape[1], targets.shape[1])
            self._means = inputs.new_zeros(inputs.shape[1] + 1, dtype=wide)
            self._sums = inputs.new_zeros(targets.shape[1], dtype=wide)
            self._squares = torch.zeros_like(self._sums)
        if weights is not None:
            inputs, targets = inputs * roots[:, None], targets * roots[:, None]
        self._inputs.update(inputs)
        self._products.addmm_(inputs.T, targets)
        # The constant is an input too: its rows are the roots of the weights.
        self._means[:-1] += roots @ inputs
        self._means[-1] += roots.square().sum()
        self._sums += roots @ targets
        self._squares += targets.square().sum(0)

    @property
    def squares(self) -> Tensor:
        """E[w y^2], (out,) float64, w being the weights."""
        return self._squares / self.count

    def gram(self, constant: bool, last: int | None = None) -> Tensor:
        """E[w x x^T], (d, d); with an input more that is always 1, the last; of the last of the others only."""
        first = 0 if last is None else len(self._products) - last
        products = self._inputs.products[first:, first:]
        if not constant:
            return products
        column = (self._means[first:] / self.count).float()[:, None]
        return torch.cat([torch.cat([products, column[:-1].T]), column], dim=1)

    def products(self, constant: bool, last: int | None = None) -> Tensor:
        """E[w x y^T], (d, out), of the same inputs."""
        found = self._products[0 if last is None else len(self._products) - last :] / self.count
        return torch.cat([found, (self._sums / self.count).float()[None]]) if constant else found


@dataclass(frozen=True)
class Fit:
    """A change of an affine map, and what it does to the mean square of the error that it was fitted to.

    Attributes:
        weight: (out, d); None where every penalty that was tried made the held-out error larger.
        bias: (out,), or None where there was to be none.
        ridge: the penalty that did best on held-out rows, of those of `RIDGES` that were tried: three, and from the
            best of them on its neighbours, until both of the best are worse; infinite where nothing is changed.
        before, after: mean square of the error on held-out rows, summed over the outputs.
        idle: how many inputs are always zero.
        singular: whether there were fewer rows than inputs that are not idle, or a penalty that was tried left their
            moments singular.
    """

    weight: Tensor | None
    bias: Tensor | None
    ridge: float
    before: float
    after: float
    idle: int
    singular: bool


def ridge_fit(
    moments: RegressionMoments, held_out: RegressionMoments, *, constant: bool, last: int | None = None
) -> Fit:
    """Find the map D of least E|e - D x|^2 + ridge |D S|^2, and the ridge that is best on rows held out: see `Fit`.

    S is diagonal and holds the root mean square of each input: no input's scale decides how far its weights may move.

    Where x are what a matrix reads and e what is missing of its outputs, the matrix plus D is the ridge regression of
    all that it should put out, with a penalty on the distance from what it was. On the rows that D is fitted to its
    error is never above that of D = 0; on the rows held out it is not either, as D = 0 is among what is tried.

    Args:
        moments: of the rows to fit; inputs x, targets e.
        held_out: of the others.
        constant: whether D may add a constant, which is not penalised.
        last: use only so many inputs, the last ones; None uses all.

    Raises:
        ModelError: the moments are not finite.
    """
    return ridge_fits(moments, held_out, constant=constant, last=last)[0]


@torch.no_grad()
def ridge_fits(
    moments: RegressionMoments,
    held_out: RegressionMoments,
    *,
    constant: bool,
    last: int | None = None,
    targets: int = 1,
) -> list[Fit]:
    """Do what `ridge_fit` does for several targets of the same inputs at once, each with a ridge of its own.

    Args:
        targets: how many; the outputs are theirs, one after the other, equally many of each.
    """
    gram, products = moments.gram(constant, last), moments.products(constant, last)
    other_gram, other_products = held_out.gram(constant, last), held_out.products(constant, last)
    inputs = len(gram) - constant
    energies = gram.diagonal()[:inputs]
    if not all(each.isfinite().all() for each in (gram, products, other_products, held_out.squares)):
        raise ModelError(NOT_FINITE)
    idle = int((energies == 0).sum())
    before = held_out.squares.view(targets, -1).sum(1)
    best, singular = before.clone(), moments.count < inputs - idle
    chosen: list[tuple[float, Tensor] | None] = [None] * targets
    # Each input's own mean square; an input that is always zero keeps its weights whatever the penalty.
    wide = widest(gram.device)
    penalties = torch.where(energies > 0, energies, 1.0).to(wide)
    # In double precision: the smallest penalty is far below the largest eigenvalue.
    damped, wanted = gram.to(wide), products.to(wide)

    def tried(ridge: float) -> Tensor:
        """Solve with a penalty and keep what is the best so far; return the errors, (targets,)."""
        nonlocal best, singular
        damped.diagonal()[:inputs] = energies.to(wide) + ridge * penalties
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            singular = True
            return torch.full_like(before, torch.inf)
        change = torch.cholesky_solve(wanted, factor).float()
        gained = (change * (other_gram @ change - 2 * other_products)).sum(0, dtype=wide)
        errors = before + gained.view(targets, -1).sum(1)
        for place, part in enumerate(change.chunk(targets, dim=1)):
            if errors[place] < best[place]:
                chosen[place] = ridge, part.clone()
        best = torch.minimum(best, errors)
        return errors

    errors: dict[int, Tensor] = {}
    places = set(_FIRST)
    while places:
        errors |= {place: tried(RIDGES[place]) for place in sorted(places)}
        best_places = torch.stack([*errors.values()]).argmin(0).tolist()
        beside = {[*errors][best_place] + step for best_place in best_places for step in (-1, 1)}
        places = beside.intersection(range(len(RIDGES))) - errors.keys()
    return [
        Fit(None, None, math.inf, float(was), float(was), idle, singular)
        if found is None
        else Fit(
            found[1][:inputs].T,
            found[1][-1] if constant else None,
            found[0],
            float(was),
            max(float(left), 0.0),
            idle,
            singular,
        )
        for found, was, left in zip(chosen, before, best, strict=True)
    ]
