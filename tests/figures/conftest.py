from __future__ import annotations

import sys
from pathlib import Path

# The package stands beside src, not in it: it is no part of what is installed.
sys.path.insert(0, str(Path(__file__).parents[2]))
