"""Where labels go so that they cover neither each other nor what is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.optimize import isotonic_regression

PASSES = 4
DIRECTIONS = 16
DISTANCES = (3.0, 10.0, 20.0, 32.0, 46.0, 62.0, 80.0)


@dataclass(frozen=True)
class Box:
    """A rectangle, in points."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> Box:
        """Return the rectangle of this size centred at x, y."""
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def overlap(self, other: Box) -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
) -> list[tuple[float, float]]:
    """Return the centre of each point's label.

    In each of a few passes, every label takes the cheapest of fixed places around its point, given the others. The
    result is not the optimum, but the same each time.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        obstacles: what labels should not cover, as markers and error bars.
        bounds: what labels should not leave.
    """
    placed: list[Box | None] = [None] * len(points)
    for _ in range(PASSES):
        for index, (point, size) in enumerate(zip(points, sizes, strict=True)):
            others = [box for other, box in enumerate(placed) if box is not None and other != index]
            placed[index] = min(
                _candidates(point, size), key=lambda entry: _cost(entry[0], entry[1], others, obstacles, bounds)
            )[1]
    return [((box.left + box.right) / 2, (box.bottom + box.top) / 2) for box in placed if box is not None]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return heights within low and high, a gap apart, that are nearest to the wanted ones in least squares.

    Their order is that of the wanted ones, or as given for equal ones. If there is too little room they go above high.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    # Less the gaps below it, each height need only be no lower than the one before.
    shifted = isotonic_regression([wanted[index] - place * gap for place, index in enumerate(order)]).x
    most = high - (len(wanted) - 1) * gap
    heights = {index: max(low, min(most, float(shifted[place]))) + place * gap for place, index in enumerate(order)}
    return [heights[index] for index in range(len(wanted))]


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Box]]:
    for distance in DISTANCES:
        for step in range(DIRECTIONS):
            angle = 2 * math.pi * step / DIRECTIONS
            x = point[0] + math.cos(angle) * (distance + 4 + size[0] / 2)
            y = point[1] + math.sin(angle) * (distance + 4 + size[1] / 2)
            yield distance, Box.around(x, y, *size)


def _cost(distance: float, box: Box, others: Sequence[Box], obstacles: Sequence[Box], bounds: Box) -> float:
    area = (box.right - box.left) * (box.top - box.bottom)
    outside = area - box.overlap(bounds)
    covered = sum(map(box.overlap, others)) * 3 + sum(map(box.overlap, obstacles)) * 2
    return distance + 10 * (outside + covered)
