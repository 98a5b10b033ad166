"""Makes the figures of README and docs: see `figures`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable

from figures import pages, running
from figures.experiments import EXPERIMENTS, ROOT, Experiment, costs
from layerfold.errors import InputError, LayerfoldError, one_of
from layerfold.files import write_text

PARTS = ("all", "readme", "quality", "timed")


def main() -> int:
    """Run the command that was typed; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="what there is, what is missing, what is out of date")
    runs = commands.add_parser("run", help="run what is missing or out of date")
    runs.add_argument("names", nargs="*", metavar="NAME", help="experiments; by default all of the part")
    runs.add_argument("--part", choices=PARTS, default="all", help="readme: what README shows")
    runs.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each")
    runs.add_argument("--device", default="cpu", help="where models compute, as cpu or cuda")
    runs.add_argument("--again", action="store_true", help="run what is up to date too")
    runs.add_argument("--background", action="store_true", help="return at once, and write a log")
    fill = commands.add_parser("fill", help="fill the blocks of README and docs, and draw the plots")
    fill.add_argument("--check", action="store_true", help="write nothing, and fail where a page is not up to date")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        if options.command == "status":
            return _status()
        if options.command == "fill":
            return _check() if options.check else _fill()
        return _run(options)
    except LayerfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def _stop(*_: object) -> None:
    """End as Ctrl-C does, so that what was begun ends too."""
    raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise InputError(f"jobs {options.jobs}; accepted: 1 or more")
    for name in options.names:
        if name not in EXPERIMENTS:
            raise InputError(f"unknown experiment {one_of(name, EXPERIMENTS)}")
    chosen = [EXPERIMENTS[name] for name in options.names] or [*_of_part(options.part)]
    todo = []
    for each in [each for each in chosen if options.again or not each.up_to_date()]:
        lacks = running.missing(each)
        if each.device == "cuda" and options.device.partition(":")[0] != "cuda":
            lacks = "needs --device cuda"
        if lacks:
            print(f"{each.name} is left out: it {lacks}")
        else:
            todo.append(each)
    minutes = sum(each.minutes for each in todo)
    print(f"{len(todo)} of {len(chosen)} experiments to run, about {minutes / 60:.1f} hours of one thread", flush=True)
    if options.background and todo:
        words = ["run", *(each.name for each in todo), "--jobs", str(options.jobs), "--device", options.device]
        words += ["--again"] * options.again
        process = running.in_background(words)
        print(f"process {process} runs them; its log: {running.LOG.relative_to(ROOT)}; `make figures-status` looks on")
        return 0
    return 1 if running.run(todo, options.jobs, options.device, _say) else 0


def _say(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)


def _of_part(part: str) -> list[Experiment]:
    fed = pages.fed()
    wanted: dict[str, Callable[[Experiment], bool]] = {
        "all": lambda each: True,
        "readme": lambda each: "README.md" in fed.get(each.name, []),
        "quality": lambda each: not each.timed,
        "timed": lambda each: each.timed,
    }
    return [each for each in EXPERIMENTS.values() if wanted[part](each)]


def _status() -> int:
    fed, taken = pages.fed(), costs()
    for each in EXPERIMENTS.values():
        state = "up to date" if each.up_to_date() else "out of date" if each.stored() else "missing"
        took = f"took {taken[each.name]['minutes']} min" if each.name in taken else f"about {each.minutes:g} min"
        print(f"{each.name:<16} {state:<12} {took:<16} {', '.join(fed.get(each.name, ['no page']))}")
    return 0


def _fill() -> int:
    from figures import plots  # which needs matplotlib: a machine that only runs experiments does without

    plots.draw_all()
    for page in pages.pages():
        text = page.read_text(encoding="utf-8")
        if (new := pages.filled(text)) != text:
            write_text(page, new)
            print(f"{page.relative_to(ROOT)} is filled")
    return 0


def _check() -> int:
    from figures import plots

    stale = [*pages.stale(), *plots.stale()]
    for name in stale:
        print(f"{name} is not what results/ says: run `make docs-figures`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
