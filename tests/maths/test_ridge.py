"""Ridge regression from streamed moments, against numpy's float64 on all rows at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.maths.ridge import RIDGES, Fit, HeldOut, RegressionMoments, _Penalised, ridge_fit, ridge_fits

Array = NDArray[np.float64]
Rows = tuple[Tensor, Tensor]
EITHER = pytest.mark.parametrize("constant", [False, True], ids=["no constant", "constant"])


def moments(rows: Rows, batch: int = 17) -> RegressionMoments:
    found = RegressionMoments()
    for inputs, targets in zip(rows[0].split(batch), rows[1].split(batch), strict=True):
        found.update(inputs, targets)
    return found


def drawn(seed: int, rows: int = 300, inputs: int = 12, outputs: int = 5, noise: float = 0.5) -> tuple[Rows, Rows]:
    """Rows to fit and rows held out of one linear map, whose inputs and outputs have means of their own."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(inputs, outputs, generator=draw)
    scale = torch.logspace(0, -1, inputs) if inputs else torch.ones(0)

    def some() -> Rows:
        x = torch.randn(rows, inputs, generator=draw) * scale + 0.3
        return x, x @ weight + 1 + noise * torch.randn(rows, outputs, generator=draw)

    return some(), some()


def array(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def solved(rows: Rows, ridge: float, constant: bool, last: int | None = None) -> Array:
    """(inputs, outputs), the constant's row the last: least squares of rows that stand for the penalty."""
    x, y = map(array, rows)
    x = x if last is None else x[:, len(x[0]) - last :]
    if not x.shape[1] + constant:
        return np.zeros((0, y.shape[1]))
    penalty = np.diag(np.sqrt(ridge * (x**2).sum(0)))
    below = np.hstack([penalty, np.zeros((x.shape[1], int(constant)))])
    above = np.hstack([x, np.ones((len(x), int(constant)))])
    return np.linalg.lstsq(np.vstack([above, below]), np.vstack([y, np.zeros((len(below), y.shape[1]))]))[0]


def error(rows: Rows, weight: Array, bias: Array | float = 0.0, last: int | None = None) -> float:
    """The mean square of what is left, summed over the outputs."""
    x, y = map(array, rows)
    x = x if last is None else x[:, len(x[0]) - last :]
    return float(((y - x @ weight.T - bias) ** 2).sum(1).mean())


def of(rows: Rows, fit: Fit, last: int | None = None) -> float:
    """The mean square that a fit leaves."""
    if fit.weight is None:
        return float((array(rows[1]) ** 2).sum(1).mean())
    return error(rows, array(fit.weight), 0.0 if fit.bias is None else array(fit.bias), last)


@EITHER
@pytest.mark.parametrize("last", [None, 0, 1, 7, 12])
def test_the_map_is_the_ridge_regression(last: int | None, constant: bool) -> None:
    fitted, held_out = drawn(0)
    fit = ridge_fit(moments(fitted), moments(held_out), constant=constant, last=last)
    if last == 0 and not constant:
        assert (fit.weight, fit.bias, fit.ridge) == (None, None, math.inf)
        return
    expected = solved(fitted, fit.ridge, constant, last)
    assert fit.weight is not None
    assert fit.weight.shape == (5, 12 if last is None else last)
    assert (fit.bias is not None) == constant
    inputs = fit.weight.shape[1]
    assert array(fit.weight.T) == pytest.approx(expected[:inputs], abs=1e-4)
    if fit.bias is not None:
        assert array(fit.bias) == pytest.approx(expected[inputs], abs=1e-4)
    assert fit.before == pytest.approx(of(held_out, Fit(None, None, 0, 0, 0, 0, False)), rel=1e-5)
    assert fit.after == pytest.approx(of(held_out, fit, last), rel=1e-4)
    assert (fit.idle, fit.singular) == (0, False)


def test_batches_are_one_regression() -> None:
    fitted, held_out = drawn(1)
    fits = [ridge_fit(moments(fitted, n), moments(held_out, n), constant=True) for n in (1, 50, 300)]
    for fit in fits[1:]:
        assert fit.weight is not None
        assert fits[0].weight is not None
        assert (fit.weight - fits[0].weight).abs().max() < 1e-4
    assert moments(fitted).count == 300


@EITHER
def test_the_ridge_is_the_best_on_rows_held_out(constant: bool) -> None:
    chosen = set()
    for seed in range(60):
        noise, rows = (0.0, 0.3, 3.0)[seed % 3], (14, 30, 200)[seed // 3 % 3]
        fitted, held_out = drawn(seed, rows=rows, noise=noise)
        fit = ridge_fit(moments(fitted), moments(held_out), constant=constant)
        maps = [np.zeros((12 + constant, 5)), *(solved(fitted, ridge, constant) for ridge in RIDGES)]
        errors = [error(held_out, each[:12].T, each[12] if constant else 0.0) for each in maps]
        best = min(errors)
        assert fit.after == pytest.approx(best, rel=1e-3, abs=1e-6 * errors[0])
        assert fit.ridge == (math.inf, *RIDGES)[errors.index(best)] or noise == 0
        chosen.add(fit.ridge)
    assert len(chosen) >= 5


@EITHER
def test_the_scale_of_an_input_decides_nothing(constant: bool) -> None:
    scale = torch.logspace(3, -3, 12)
    fitted, held_out = drawn(1, noise=1.0)
    plain = ridge_fit(moments(fitted), moments(held_out), constant=constant)
    scaled = ridge_fit(*(moments((x * scale, y)) for x, y in (fitted, held_out)), constant=constant)
    assert plain.weight is not None
    assert scaled.weight is not None
    assert scaled.ridge == plain.ridge < math.inf
    assert scaled.after == pytest.approx(plain.after, rel=1e-4)
    assert (scaled.weight * scale - plain.weight).abs().max() < 1e-3


@EITHER
def test_rows_count_as_often_as_their_weights_say(constant: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    times = torch.randint(0, 4, (300,), generator=draw)
    repeated_rows, weighted = [], []
    for x, y in drawn(2):
        repeated_rows.append(moments((x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))))
        found = RegressionMoments()
        for each in zip(x.split(17), y.split(17), times.float().split(17), strict=True):
            found.update(*each)
        weighted.append(found)
    one, two = (ridge_fit(*both, constant=constant) for both in (repeated_rows, weighted))
    assert one.weight is not None
    assert two.weight is not None
    assert one.ridge == two.ridge
    assert (one.weight - two.weight).abs().max() < 1e-4
    if one.bias is not None and two.bias is not None:
        assert (one.bias - two.bias).abs().max() < 1e-4
    assert two.after / two.before == pytest.approx(one.after / one.before, rel=1e-4)


def test_few_penalties_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, tried = _Penalised.factor_, []

    def counted(*arguments: Any) -> bool:
        tried.append(arguments)
        return factor(*arguments)

    monkeypatch.setattr(_Penalised, "factor_", counted)
    found = set()
    for noise in (0.0, 1.0, 30.0):
        fitted, held_out = drawn(1, rows=200, noise=noise)
        tried.clear()
        found.add(ridge_fit(moments(fitted), moments(held_out), constant=False).ridge)
        assert 4 <= len(tried) <= 7 < len(RIDGES)
    assert len(found) == 3


@EITHER
@pytest.mark.parametrize("last", [None, 3])
@pytest.mark.parametrize("held", [5, 200])
def test_rows_held_out_judge_as_their_moments_do(constant: bool, last: int | None, held: int) -> None:
    fitted, (other_x, other_y) = drawn(0)[0], drawn(0, rows=held)[1]
    held = len(other_x)
    weights = torch.rand(held, generator=torch.Generator().manual_seed(0)) + 0.1
    fits = []
    for kind, consume in ((RegressionMoments, False), (HeldOut, False), (HeldOut, True)):
        judge = kind()
        for some in torch.arange(held).split(3):
            judge.update(other_x[some], other_y[some], weights[some])
        assert judge.count == held
        fits.append(ridge_fit(moments(fitted), judge, constant=constant, last=last, consume=consume))
    assert bool(fits[1].weight is not None)
    for fit in fits[1:]:
        assert fit.ridge == fits[0].ridge
        assert fit.after == pytest.approx(fits[0].after, rel=1e-4)
        assert fit.before == pytest.approx(fits[0].before, rel=1e-6)
        assert fit.weight is not None
        assert fits[0].weight is not None
        assert torch.equal(fit.weight, fits[0].weight)


def test_rows_held_out_that_are_not_finite_are_refused() -> None:
    fitted, (x, y) = drawn(0)
    judge = HeldOut()
    x[3, 2] = torch.nan
    judge.update(x[:5], y[:5])
    with pytest.raises(ModelError, match="not finite"):
        ridge_fit(moments(fitted), judge, constant=True)


@pytest.mark.parametrize("size", [1, 7, 600, 1100])
def test_a_matrix_is_factored_in_place_with_one_penalty_after_the_other(size: int) -> None:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size))
    gram = rows.T @ rows / len(rows)
    system, wanted = _Penalised(gram), torch.randn(size, 3)
    for penalty in (1.0, 0.1, 10.0):
        assert system.factor_(torch.full((size,), penalty, dtype=torch.float64))
        damped = gram.double() + penalty * torch.eye(size, dtype=torch.float64)
        assert torch.allclose(damped.float() @ system.solve(wanted), wanted, atol=1e-4)
    assert not system.factor_(torch.full((size,), -1e3, dtype=torch.float64))
    assert system.factor_(torch.ones(size, dtype=torch.float64)), "what failed leaves the matrix as it was"


def zeroed(rows: Rows, columns: slice) -> Rows:
    rows[0][:, columns] = 0
    return rows


def repeated(rows: Rows) -> Rows:
    return torch.cat([rows[0], rows[0], 2 * rows[0]], dim=1), rows[1]


HARD: dict[str, Any] = {
    "plenty of rows": lambda seed: drawn(seed),
    "less rows than inputs": lambda seed: drawn(seed, rows=5, inputs=40),
    "one row": lambda seed: drawn(seed, rows=1),
    "inputs that are one": lambda seed: tuple(map(repeated, drawn(seed))),
    "inputs that are always zero": lambda seed: tuple(zeroed(each, slice(3, 7)) for each in drawn(seed)),
    "all inputs zero": lambda seed: tuple(zeroed(each, slice(None)) for each in drawn(seed)),
    "zero when fitted": lambda seed: (zeroed(drawn(seed)[0], slice(0, 6)), drawn(seed)[1]),
    "nothing missed": lambda seed: tuple((x, torch.zeros_like(y)) for x, y in drawn(seed)),
    "no inputs": lambda seed: drawn(seed, inputs=0),
    "noise": lambda seed: drawn(seed, rows=30, noise=100.0),
    "small": lambda seed: tuple((1e-6 * x, 1e-6 * y) for x, y in drawn(seed)),
    "large": lambda seed: tuple((1e6 * x, 1e6 * y) for x, y in drawn(seed)),
    "another text": lambda seed: (drawn(seed)[0], drawn(seed + 1)[1]),
}


@EITHER
@pytest.mark.parametrize("kind", HARD)
def test_no_error_is_above_that_of_no_change(kind: str, constant: bool) -> None:
    for seed in range(6):
        fitted, held_out = HARD[kind](seed)
        fit = ridge_fit(moments(fitted), moments(held_out), constant=constant)
        nothing = Fit(None, None, 0, 0, 0, 0, False)
        for rows in (fitted, held_out):
            assert of(rows, fit) <= of(rows, nothing) * (1 + 1e-5)
        assert 0 <= fit.after <= fit.before
        assert fit.before == pytest.approx(of(held_out, nothing), rel=1e-5)
        assert fit.after == pytest.approx(of(held_out, fit), rel=1e-3, abs=1e-5 * fit.before)
        assert (fit.weight is None) == (fit.ridge == math.inf)
        assert fit.weight is None or fit.weight.isfinite().all()
        assert fit.bias is None or fit.bias.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "idle", "singular"),
    [
        ("plenty of rows", 0, False),
        ("less rows than inputs", 0, True),
        ("inputs that are always zero", 4, False),
        ("all inputs zero", 12, False),
        ("zero when fitted", 6, False),
        ("no inputs", 0, False),
    ],
)
def test_idle_inputs_and_too_few_rows_are_told_and_weights_of_idle_inputs_stay(
    kind: str, idle: int, singular: bool
) -> None:
    fitted, held_out = HARD[kind](0)
    fit = ridge_fit(moments(fitted), moments(held_out), constant=True)
    assert (fit.idle, fit.singular) == (idle, singular)
    if kind == "inputs that are always zero":
        assert fit.weight is not None
        assert not fit.weight[:, 3:7].any()
        assert fit.weight[:, :3].all()


@EITHER
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("inputs", "place"), [*((12, place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))), (0, (1, 1))], ids=str
)
def test_what_is_not_finite_is_refused(inputs: int, place: tuple[int, int], bad: float, constant: bool) -> None:
    both = drawn(0, inputs=inputs)
    both[place[0]][place[1]][4, 2] = bad
    with pytest.raises(ModelError, match=r"^activations on the calibration text are not finite$"):
        ridge_fit(*map(moments, both), constant=constant)


@EITHER
def test_several_targets_at_once_are_each_as_alone(constant: bool) -> None:
    fitted, held_out = drawn(3, outputs=6, noise=0.1)
    for rows in (fitted, held_out):
        rows[1][:, 2:4] += 30 * torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    together = ridge_fits(moments(fitted), moments(held_out), constant=constant, targets=3)
    for number, fit in enumerate(together):
        columns = slice(2 * number, 2 * number + 2)
        alone = ridge_fit(*(moments((x, y[:, columns].contiguous())) for x, y in (fitted, held_out)), constant=constant)
        assert (fit.ridge, fit.idle, fit.singular) == (alone.ridge, alone.idle, alone.singular)
        assert (fit.before, fit.after) == pytest.approx((alone.before, alone.after), rel=1e-4)
        assert (fit.weight is None) == (alone.weight is None)
        assert fit.weight is None or (fit.weight - alone.weight).abs().max() < 1e-4
    assert together[1].ridge != together[0].ridge
