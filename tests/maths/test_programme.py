"""Integer programmes of choices."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import pytest
from scipy.optimize import LinearConstraint

from layerfold.maths import programme
from layerfold.maths.programme import taken_least


def test_the_least_sum_within_the_constraints_is_taken() -> None:
    costs, weights = np.array([-3.0, -2.0, -2.0, 1.0]), np.array([3.0, 2.0, 2.0, 1.0])
    taken = taken_least(costs, [LinearConstraint(weights, -np.inf, 4)])
    assert taken is not None
    assert taken.tolist() == [False, True, True, False]
    assert taken_least(costs, [LinearConstraint(weights, 9, np.inf)]) is None


def test_what_the_solver_prints_is_not_in_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(*given: Any, **more: Any) -> Any:
        os.write(1, b"noise\n")
        ctypes.CDLL(None).puts(b"noise from C")
        return solver(*given, **more)

    solver = programme.milp
    monkeypatch.setattr(programme, "milp", noisy)
    print("before")
    assert taken_least(np.array([-1.0]), []) is not None
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
