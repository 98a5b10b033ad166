"""The trials of a plan as a CSV file."""

from __future__ import annotations

from pathlib import Path

from layerfold.planning import Evaluation, Planned
from layerfold.report.plan import held_out, latency, standing
from layerfold.report.search_spreadsheet import Row, bounds_of, write_rows


def write_plan_csv(planned: Planned, path: Path) -> None:
    """Write one row a trial, as they were tried: unrounded, and empty where nothing was measured.

    Raises:
        OutputError: the file cannot be written.
    """
    write_rows([_row(planned, trial) for trial in planned.trials], path)


def _row(planned: Planned, trial: Evaluation) -> Row:
    base, tested, timed = planned.base, held_out(planned, trial), latency(planned, trial)
    return {
        "said": trial.said,
        "family": trial.family,
        "repair": trial.repair,
        "whole": trial.whole,
        "standing": standing(planned, trial),
        "blocks": trial.blocks,
        "neurons": trial.neurons,
        "heads": trial.heads,
        "parameters": trial.parameters,
        "perplexity": trial.perplexity,
        "parameters_change_percent": 100 * (trial.parameters / base.parameters - 1),
        "perplexity_change_percent": 100 * (trial.perplexity / base.perplexity - 1),
        **bounds_of("test_perplexity", None if tested is None else tested.perplexity),
        **bounds_of("test_versus_base", None if tested is None else tested.versus_base),
        **bounds_of("milliseconds", None if timed is None else timed.milliseconds),
        **bounds_of("speedup", None if timed is None else timed.speedup),
    }
