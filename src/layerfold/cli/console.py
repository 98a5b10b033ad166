"""What commands show: progress bars on standard error, reports and JSON documents on standard output."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layerfold.progress import SILENT, Progress, Step, T

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from layerfold.checkpoint.model import Model
    from layerfold.report.report import Report


LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal to draw bars on."""


class _Drawn:
    """Draws one bar for each level of work; an inner one goes when it is done.

    Bars need a terminal. Elsewhere, as in a log, there is a line of progress in ten seconds at most.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._begun: dict[TaskID, float] = {}
        self._lined = time.monotonic()  # what is done sooner than that needs no line
        self.notes: list[str] = []

    def track(self, items: Iterable[T], description: str, total: float | None = None) -> Iterable[T]:
        """Yield the items and move the bar."""
        if total is None:
            items = list(items)
            total = float(len(items))
        task = self._start(description, total)
        try:
            for item in items:
                if isinstance(item, Step):
                    self._bars.update(task, description=f"{description}: {item.description}")
                self._line()
                yield item
                self._bars.advance(task, item.weight if isinstance(item, Step) else 1.0)
        finally:
            self._bars.remove_task(task)

    @contextmanager
    def doing(self, description: str) -> Iterator[None]:
        """Show a bar without an end."""
        task = self._start(description, None)
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def note(self, line: str) -> None:
        """Show a line above the bars, or keep it for the end where there are none."""
        if self._bars.disable:
            self.notes.append(line)
        else:
            self._print(line)

    def result(self, line: str) -> None:
        """Show a line above the bars, if there are any."""
        self._print(line)

    def _print(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> None:
        """Where no bars are drawn, print what is being done, how far it is, the time taken and an estimate of the rest.

        The estimate is that of the outermost work.
        """
        now = time.monotonic()
        if not self._bars.disable or now < self._lined + LINE_EVERY:
            return
        self._lined = now
        outer, *_ = tasks = self._bars.tasks
        taken, said = now - self._begun[outer.id], ""
        if outer.total:
            done = outer.completed / outer.total
            said = f"{done:.0%}, {_clock(taken)}" + (
                f", about {_clock(taken * (1 - done) / done)} left" if done else ""
            )
        self._print(f"{'; '.join(task.description for task in tasks)} ({said or _clock(taken)})")

    def _start(self, description: str, total: float | None) -> TaskID:
        task = self._bars.add_task(description, total=total)
        self._begun[task] = time.monotonic()
        return task


def _clock(seconds: float) -> str:
    """Write a duration, as 1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def drawn(show: bool = True, *, as_json: bool = False) -> Iterator[Progress]:
    """Yield a `Progress` that draws on standard error: the work, how far it is, the time taken and the time left.

    Args:
        show: off in the processes beside the first, where several are launched together.
        as_json: whether standard output is to hold JSON alone, so that notes go to standard error.
    """
    if not show:
        yield SILENT
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        drawing = _Drawn(bars)
        yield drawing
    # Not where the work was refused: that is one line alone.
    (sys.stderr if as_json else sys.stdout).writelines(f"{line}\n" for line in drawing.notes)


@contextmanager
def loaded(
    model: str, revision: str | None, trust_remote_code: bool, *, show: bool = True, as_json: bool = False
) -> Iterator[tuple[Model, Progress]]:
    """Load a model; yield it with a `Progress` for the work with it, see `drawn`."""
    from layerfold.checkpoint.load import load
    from layerfold.environment import AUTO, offload_of

    with drawn(show, as_json=as_json) as progress:
        with progress.doing(f"loading {model}"):
            found = load(model, revision=revision, trust_remote_code=trust_remote_code)
        if found.decoder.offloaded and offload_of() == AUTO:
            progress.note("memory is too small for the weights and a copy of them: they wait in temporary files")
        yield found, progress


def present(
    report: Report,
    folder: Path,
    table: str,
    document: Any,
    as_json: bool,
    at: Mapping[str, object],
    printed: Report | None = None,
) -> None:
    """Write the files of a report into a folder, and print the report, or one JSON document and nothing else.

    Args:
        table: name of the CSV file; the page is ``report.html``.
        at: where else something was written, by what it is.
        printed: what is printed in place of the report.
    """
    from rich.console import Console

    from layerfold.report import print_report, write_csv, write_page

    page = folder / "report.html"
    write_csv(report, folder / table)
    write_page(report, page)
    if as_json:
        print_json(document)
        return
    print_report(printed or report, Console())
    for name, place in {**at, "report": page}.items():
        typer.echo(f"{name}: {place}")


def print_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
