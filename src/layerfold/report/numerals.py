"""How a number is written for people. Every function takes nan and infinities."""

from __future__ import annotations

import math
from collections.abc import Mapping


def significant(value: float, digits: int = 3) -> str:
    """Write a number with a given count of significant digits: ``81.24``, ``9,012``, ``3.98e5``, ``nan``, ``inf``."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    # The exponent of the rounded number: 99.96 is 100, not 100.0.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if not -4 <= exponent <= 4:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def times(value: float) -> str:
    """Write a factor: ``0.98``, ``1.02``, ``23.2``, ``111``."""
    return f"{value:.2f}" if 0.1 <= value < 1 else significant(value)


def precise(value: float) -> str:
    """Write a number with four significant digits."""
    return significant(value, 4)


def plain(value: float) -> str:
    """Write a setting with no more digits than it has: ``0.001``, ``3e-5``, ``16``."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def whole(value: float) -> str:
    """Write a whole number with thousands separated."""
    return f"{value:,.0f}"


def count(value: float) -> str:
    """Write a large count with a suffix: ``6.96M``, ``124M``, ``1.50B``."""
    return _scaled(value, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}) or whole(value)


def memory(value: float) -> str:
    """Write a number of bytes in decimal units: ``27.8 MB``."""
    return _scaled(value, {" GB": 1e9, " MB": 1e6, " kB": 1e3}) or f"{whole(value)} B"


def megabytes(value: float) -> str:
    """Write a number of bytes in megabytes, a million each, without the unit: ``27.8``."""
    return significant(value / 1e6)


def _scaled(value: float, units: Mapping[str, float]) -> str:
    """Write a number in the first unit that is not larger; empty if there is none."""
    found = (significant(value / size) + unit for unit, size in units.items() if size <= abs(value) < math.inf)
    return next(found, "")


def percent(value: float) -> str:
    """Write a fraction as a percentage: ``17.2%``."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else significant(value)


def rough_percent(value: float) -> str:
    """Write an estimated fraction as a percentage, without decimals from 10% on: ``3.4%``, ``17%``."""
    return f"{100 * value:.0f}%" if 0.0995 <= abs(value) < math.inf else percent(value)


def change(percent: float) -> str:
    """Write a change in percent with its sign: ``-43.0%``, ``+107%``, ``+30,686%``."""
    if not math.isfinite(percent):
        return significant(percent)
    sign = "+" if percent > 0 else ""
    return f"{percent:+.1f}%" if abs(percent) < 99.95 else f"{sign}{significant(percent)}%"


def printable(text: str) -> str:
    """Replace characters that cannot be printed (line ends, escapes, surrogates), so that text stays in its place."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
