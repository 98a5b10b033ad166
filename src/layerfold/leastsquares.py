"""Ridge regression from streamed moments: what a matrix's weights gain so that it makes up for an error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.statistics import SecondMoments

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
        roots = inputs.new_ones(len(inputs)) if weights is None else weights.sqrt()
        if not self.count:
            self._products = torch.zeros(inputs.shape[1], targets.shape[1])
            self._means = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64)
            self._sums = torch.zeros(targets.shape[1], dtype=torch.float64)
            self._squares = torch.zeros(targets.shape[1], dtype=torch.float64)
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
    """A change of an affine map, fitted to all rows with the penalty that did best on the rows held out.

    Attributes:
        weight: (out, d); None where every penalty that was tried made the held-out error larger.
        bias: (out,), or None where there was to be none.
        apart: weight and bias fitted without the rows held out; their error there is `after`.
        ridge: the penalty that did best on held-out rows, of those of `RIDGES` that were tried: three, and from the
            best of them on its neighbours, until both of the best are worse; infinite where nothing is changed.
        before, after: mean square of the error on held-out rows, summed over the outputs: of no change, and of `apart`.
        idle: how many inputs are always zero.
        singular: whether there were fewer rows than inputs that are not idle, or a penalty that was tried left their
            moments singular.
    """

    weight: Tensor | None
    bias: Tensor | None
    apart: tuple[Tensor | None, Tensor | None]
    ridge: float
    before: float
    after: float
    idle: int
    singular: bool

    def without_held_out(self) -> Fit:
        """Return the change that was fitted without the rows held out."""
        return replace(self, weight=self.apart[0], bias=self.apart[1])


def ridge_fit(
    moments: RegressionMoments, held_out: RegressionMoments, *, constant: bool, last: int | None = None
) -> Fit:
    """Find the map D of least E|e - D x|^2 + ridge |D S|^2, and the ridge that is best on rows held out: see `Fit`.

    S is diagonal and holds the root mean square of each input: no input's scale decides how far its weights may move.

    Where x are what a matrix reads and e what is missing of its outputs, the matrix plus D is the ridge regression of
    all that it should put out, with a penalty on the distance from what it was. The rows held out choose the ridge, or
    D = 0 where that is best on them. D is then fitted once more, to all rows: its error on them is never above that of
    D = 0.

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
    fitted, others = (_Equations.of(each, constant, last) for each in (moments, held_out))
    inputs = len(fitted.gram) - constant
    if not all(each.isfinite().all() for each in (*fitted, *others, held_out.squares)):
        raise ModelError(NOT_FINITE)
    before = held_out.squares.view(targets, -1).sum(1)
    best, ridges = before.clone(), [math.inf] * targets
    apart: list[Tensor | None] = [None] * targets
    alive = int((fitted.gram.diagonal()[:inputs] != 0).sum())
    singular = moments.count < alive
    system = _System(fitted, inputs)

    def tried(ridge: float) -> Tensor:
        """Solve with a penalty and keep what is the best so far; return the errors, (targets,)."""
        nonlocal best, singular
        change = system.solved(ridge)
        if change is None:
            singular = True
            return torch.full_like(before, torch.inf)
        gained = (change * (others.gram @ change - 2 * others.products)).sum(0, dtype=torch.float64)
        errors = before + gained.view(targets, -1).sum(1)
        for place, part in enumerate(change.chunk(targets, dim=1)):
            if errors[place] < best[place]:
                ridges[place], apart[place] = ridge, part.clone()
        best = torch.minimum(best, errors)
        return errors

    errors: dict[int, Tensor] = {}
    places = set(_FIRST)
    while places:
        errors |= {place: tried(RIDGES[place]) for place in sorted(places)}
        best_places = torch.stack([*errors.values()]).argmin(0).tolist()
        beside = {[*errors][best_place] + step for best_place in best_places for step in (-1, 1)}
        places = beside.intersection(range(len(RIDGES))) - errors.keys()
    del system
    # Once more with all rows, whose equations are the mean of both: in the place of those that are not needed now.
    fitted.lerp_(others, held_out.count / (moments.count + held_out.count))
    idle = int((fitted.gram.diagonal()[:inputs] == 0).sum())
    system = _System(fitted, inputs)
    whole = list(apart)
    for ridge in {*ridges} - {math.inf}:
        if (change := system.solved(ridge)) is not None:
            for place, part in enumerate(change.chunk(targets, dim=1)):
                if ridges[place] == ridge:
                    whole[place] = part.clone()

    def split(change: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Part the weights from the constant."""
        return (None, None) if change is None else (change[:inputs].T, change[-1] if constant else None)

    return [
        Fit(*split(all_rows), split(some), ridge, float(was), max(float(left), 0.0), idle, singular)
        for all_rows, some, ridge, was, left in zip(whole, apart, ridges, before, best, strict=True)
    ]


class _Equations(NamedTuple):
    """The normal equations of a regression: gram @ D = products."""

    gram: Tensor
    products: Tensor

    @classmethod
    def of(cls, moments: RegressionMoments, constant: bool, last: int | None) -> _Equations:
        return cls(moments.gram(constant, last), moments.products(constant, last))

    def lerp_(self, other: _Equations, share: float) -> None:
        """Become the weighted mean with another's."""
        self.gram.lerp_(other.gram, share)
        self.products.lerp_(other.products, share)


class _System:
    """Normal equations in double precision, as the smallest penalty is far below the largest eigenvalue.

    Args:
        inputs: how many are penalised, the first ones: each in units of its own mean square.
    """

    def __init__(self, equations: _Equations, inputs: int) -> None:
        self._damped, self._products = equations.gram.double(), equations.products.double()
        self._diagonal = self._damped.diagonal()[:inputs]
        self._energies = self._diagonal.clone()
        # An input that is always zero keeps its weights, whatever the penalty.
        self._penalties = torch.where(self._energies > 0, self._energies, 1.0)

    def solved(self, ridge: float) -> Tensor | None:
        """Return D, (d, out); None where the equations are singular."""
        self._diagonal.copy_(self._energies + ridge * self._penalties)
        factor, failed = torch.linalg.cholesky_ex(self._damped)
        return None if failed else torch.cholesky_solve(self._products, factor).float()
