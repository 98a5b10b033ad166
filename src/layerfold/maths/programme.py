"""Integer programmes of choices: which things to take."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from layerfold.maths.intervals import Floats


def taken_least(costs: Floats, constraints: Sequence[LinearConstraint]) -> NDArray[np.bool_] | None:
    """Return which things to take for the least sum of costs, (things,), by HiGHS; None where nothing is allowed.

    Args:
        costs: (things,).
        constraints: on (things,) numbers, 1 for what is taken and 0 for the others.
    """
    with _silent():
        found = milp(costs, constraints=constraints, integrality=np.ones(len(costs)), bounds=Bounds(0, 1))
    return None if found.x is None else found.x > 0.5


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep from standard output, where a document may go, a line that HiGHS prints there now and then from C."""
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    sys.stdout.flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with contextlib.suppress(OSError, TypeError, AttributeError):  # no C library to ask
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
