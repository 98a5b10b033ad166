"""Ridge regression from streamed moments: what a matrix's weights gain so that it makes up for an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import lapack
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

    def gram(self, constant: bool, last: int | None = None, *, consume: bool = False) -> Tensor:
        """E[w x x^T], (d, d); with an input more that is always 1, the last; of the last of the others only.

        Args:
            consume: return the accumulator itself if possible. Afterwards no moments of inputs can be asked for.
        """
        first = 0 if last is None else len(self._products) - last
        products = (self._inputs.consumed() if consume else self._inputs.products)[first:, first:]
        if not constant:
            return products
        column = (self._means[first:] / self.count).float()[:, None]
        return torch.cat([torch.cat([products, column[:-1].T]), column], dim=1)

    def products(self, constant: bool, last: int | None = None, *, consume: bool = False) -> Tensor:
        """E[w x y^T], (d, out), of the same inputs; see `gram`, which is to be asked first."""
        found = self._products[0 if last is None else len(self._products) - last :]
        if consume:
            self._products = found.new_empty(0, 0)
        found = found.div_(self.count) if consume else found / self.count
        return torch.cat([found, (self._sums / self.count).float()[None]]) if constant else found

    def judge(self, constant: bool, last: int | None = None, *, consume: bool = False) -> Judge:
        """Return a function that says what a change D of some outputs adds to E[w |y - D x|^2]: see `Judge`."""
        gram, products = self.gram(constant, last, consume=consume), self.products(constant, last, consume=consume)
        if not (products.isfinite().all() and gram.isfinite().all()):
            raise ModelError(NOT_FINITE)

        def gained(change: Tensor, outputs: slice) -> Tensor:
            found = change * (gram @ change - 2 * products[:, outputs])
            return found.sum(0, dtype=widest(change.device))

        return gained


class HeldOut:
    """Rows that changes are judged by: the rows themselves, or their moments where those take less memory."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._moments = RegressionMoments()

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._moments.count or sum(len(inputs) for inputs, _, _ in self._rows)

    def update(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: see `RegressionMoments.update`."""
        weights = inputs.new_ones(len(inputs), dtype=torch.float32) if weights is None else weights
        if not self._moments.count:
            self._rows.append((inputs.float(), targets.float(), weights))
            if self.count <= inputs.shape[1]:
                return
        else:
            self._moments.update(inputs, targets, weights)
        for row in self._rows:
            self._moments.update(*row)
        self._rows = []

    @property
    def squares(self) -> Tensor:
        """E[w y^2], (out,) float64, w being the weights."""
        if self._moments.count:
            return self._moments.squares
        sums = [
            (targets.square() * weights[:, None]).sum(0, dtype=widest(targets.device))
            for _, targets, weights in self._rows
        ]
        return torch.stack(sums).sum(0) / self.count

    def judge(self, constant: bool, last: int | None = None, *, consume: bool = False) -> Judge:
        """Return a function that says what a change D of some outputs adds to E[w |y - D x|^2]: see `Judge`."""
        if self._moments.count:
            return self._moments.judge(constant, last, consume=consume)
        if not all(each.isfinite().all() for row in self._rows for each in row):
            raise ModelError(NOT_FINITE)
        first = 0 if last is None else self._rows[0][0].shape[1] - last

        def gained(change: Tensor, outputs: slice) -> Tensor:
            total = torch.zeros(change.shape[1], dtype=widest(change.device), device=change.device)
            for inputs, targets, weights in self._rows:
                given = inputs[:, first:] @ (change[:-1] if constant else change)
                given = given + change[-1] if constant else given
                given *= (given - 2 * targets[:, outputs]) * weights[:, None]
                total += given.sum(0, dtype=total.dtype)
            return total / self.count

        return gained


Judge = Callable[[Tensor, slice], Tensor]
"""Takes a change of some outputs, (d, outputs) float32, and these; returns what it adds to each, (outputs,) float64."""


class _Penalised:
    """A symmetric matrix H, (d, d) float32, factored with several penalties on its diagonal, one after the other.

    On a processor it holds one matrix in double precision, which the smallest penalty needs: the factor is in one of
    its triangles, and H in the other.
    """

    def __init__(self, gram: Tensor) -> None:
        self.diagonal = gram.diagonal().to(widest(gram.device))
        self._matrix = gram.to(self.diagonal.dtype)
        self._factor = self._matrix
        self._in_place = gram.device.type == "cpu" and len(gram) > 0

    def factor_(self, penalties: Tensor) -> bool:
        """Factor H + diag(penalties), (d,) each; return whether it is definite."""
        if not self._in_place:
            damped = self._matrix.clone()
            damped.diagonal().copy_(self.diagonal + penalties)
            self._factor, failed = torch.linalg.cholesky_ex(damped)
            return not failed
        matrix = self._matrix
        for start in range(0, len(matrix), _STRIP):
            end = start + _STRIP
            matrix[start:end, end:] = matrix[end:, start:end].T
            square = matrix[start:end, start:end].tril(-1)
            matrix[start:end, start:end] = square + square.T
        matrix.diagonal().copy_(self.diagonal + penalties)
        # To LAPACK, which counts columns first, the lower triangle is what is the upper one here.
        _, failed = lapack.dpotrf(matrix.numpy().T, lower=1, clean=0, overwrite_a=1)
        return not failed

    def solve(self, wanted: Tensor) -> Tensor:
        """Return x, (d, columns) float32, of (H + diag(penalties)) x = wanted."""
        if not self._in_place:
            return torch.cholesky_solve(wanted.to(self._matrix.dtype), self._factor).float()
        columns = wanted.T.contiguous().to(self._matrix.dtype).numpy().T
        found, _ = lapack.dpotrs(self._matrix.numpy().T, columns, lower=1, overwrite_b=1)
        return torch.from_numpy(found).float()


_STRIP = 512
"""Rows that are copied at a time from one triangle to the other."""

_COLUMNS = 512
"""Outputs that are solved for at a time."""


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
    moments: RegressionMoments,
    held_out: RegressionMoments | HeldOut,
    *,
    constant: bool,
    last: int | None = None,
    consume: bool = False,
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
        consume: overwrite the moments, which are not asked again: it takes less memory.

    Raises:
        ModelError: the moments are not finite.
    """
    return ridge_fits(moments, held_out, constant=constant, last=last, consume=consume)[0]


@torch.no_grad()
def ridge_fits(
    moments: RegressionMoments,
    held_out: RegressionMoments | HeldOut,
    *,
    constant: bool,
    last: int | None = None,
    targets: int = 1,
    consume: bool = False,
) -> list[Fit]:
    """Do what `ridge_fit` does for several targets of the same inputs at once, each with a ridge of its own.

    Args:
        targets: how many; the outputs are theirs, one after the other, equally many of each.
    """
    judged = held_out.judge(constant, last, consume=consume)
    gram = moments.gram(constant, last, consume=consume)
    products = moments.products(constant, last, consume=consume)
    inputs = len(gram) - constant
    if not all(each.isfinite().all() for each in (gram, products, held_out.squares)):
        raise ModelError(NOT_FINITE)
    system = _Penalised(gram)
    del gram
    energies = system.diagonal[:inputs]
    idle = int((energies == 0).sum())
    before = held_out.squares.view(targets, -1).sum(1)
    best, singular = before.clone(), moments.count < inputs - idle
    chosen: list[tuple[float, Tensor] | None] = [None] * targets
    # Each input's own mean square; an input that is always zero keeps its weights whatever the penalty.
    scales = torch.where(energies > 0, energies, 1.0)

    def tried(ridge: float) -> Tensor:
        """Solve with a penalty and keep what is the best so far; return the errors, (targets,)."""
        nonlocal best, singular
        penalties = torch.zeros_like(system.diagonal)
        penalties[:inputs] = ridge * scales
        if not system.factor_(penalties):
            singular = True
            return torch.full_like(before, torch.inf)
        change, gained = torch.empty_like(products), torch.zeros_like(held_out.squares)
        for start in range(0, products.shape[1], _COLUMNS):
            some = slice(start, start + _COLUMNS)
            change[:, some] = found = system.solve(products[:, some])
            gained[some] = judged(found, some)
        errors = before + gained.view(targets, -1).sum(1)
        for place, part in enumerate(change.chunk(targets, dim=1)):
            if errors[place] < best[place]:
                chosen[place] = ridge, part.clone() if targets > 1 else part
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
