"""What commands print for programs."""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def print_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
