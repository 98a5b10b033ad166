"""Backward elimination against brute force."""

from __future__ import annotations

import torch
from torch import Tensor

from layerfold.maths.elimination import eliminated


def data(inputs: int, rows: int = 400) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, inputs, generator=seeded) @ torch.randn(inputs, inputs, generator=seeded)
    return mixed, mixed @ torch.randn(inputs, 5, generator=seeded) + 0.1 * torch.randn(rows, 5, generator=seeded)


def error(x: Tensor, y: Tensor, damping: Tensor, kept: list[int]) -> float:
    """The least error of the damped regression on some inputs, drawn to 0."""
    read = torch.cat([x[:, kept] / len(x) ** 0.5, torch.diag(damping[kept].sqrt())])
    wanted = torch.cat([y / len(x) ** 0.5, torch.zeros(len(kept), y.shape[1])])
    return float((wanted - read @ torch.linalg.lstsq(read, wanted).solution).square().sum())


def brute(x: Tensor, y: Tensor, groups: list[list[int]]) -> list[int]:
    damping, left, order = 3e-3 * x.square().mean(0), list(range(len(groups))), []
    while left:
        errors = {one: error(x, y, damping, [i for g in left if g != one for i in groups[g]] or [0]) for one in left}
        order.append(min(left, key=lambda one: errors[one]) if len(left) > 1 else left[0])
        left.remove(order[-1])
    return order


def test_groups_go_in_the_order_of_brute_force() -> None:
    for inputs, width in ((7, 1), (12, 3)):
        x, y = data(inputs)
        gram, products = x.T @ x / len(x), x.T @ y / len(x)
        groups = torch.arange(inputs).view(-1, width).tolist()
        found = eliminated(gram, products, torch.zeros(5, inputs), torch.arange(inputs), width)
        assert found.tolist() == brute(x.double(), y.double(), groups)


def test_inputs_that_are_not_candidates_stay_and_make_up_for_the_others() -> None:
    x, y = data(6)
    x[:, 3] = x[:, 0] + 1e-3 * x[:, 3]  # either can stand for the other
    gram, products = x.T @ x / len(x), x.T @ y / len(x)
    start = torch.zeros(5, 6)
    assert eliminated(gram, products, start, torch.arange(3, 6))[0] == 0  # input 3, which input 0 stands in for
    assert eliminated(gram, products, start, torch.arange(1, 6))[0] == 2


def test_weights_decide_where_there_are_no_rows_and_several_go_at_once() -> None:
    start = torch.tensor([[1.0, 0.0, 2.0, 3.0], [0.0, 0.5, 0.0, 1.0]])
    gram = 1e-9 * torch.eye(4)
    found = eliminated(gram, gram @ start.T, start, torch.arange(4))
    assert found.tolist() == [1, 0, 2, 3]
    assert eliminated(gram, gram @ start.T, start, torch.arange(4), at_once=3).tolist() == [1, 0, 2, 3]
