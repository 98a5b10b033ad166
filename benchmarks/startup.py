"""Time until `layerfold` answers what needs no model: the version, help, and a word typed wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from shape import Figures, arguments, report

WORDS = ("--version", "--help", "compress --help", "compress merge --help", "plan --help", "compress merge --grops 1-4")
BARE = "python -c pass"


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """How long a command of this interpreter takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def main() -> None:
    options = arguments(__doc__)
    commands = {f"layerfold {words}": ["-m", "layerfold.cli", *words.split()] for words in WORDS}
    commands = {BARE: ["-c", "pass"], **commands}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as compiled:  # bytecode, which an installation has
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = compiled
        for number in range(4 if options.quick else 22):
            for name, command in commands.items():
                found = seconds(command, environment)
                if number:  # the first compiles
                    taken[name].append(found)
    bare = taken.pop(BARE)
    figures: Figures = {f"{BARE}, s": median(bare)}
    for name, each in taken.items():
        figures[f"{name}, s"] = median(each)
        figures[f"{name}, beyond twice {BARE}, s"] = median(
            mine - 2 * other for mine, other in zip(each, bare, strict=True)
        )
    report("startup", figures, options.json)


if __name__ == "__main__":
    main()
