"""The commands: a thin layer over `layerfold.api`, `layerfold.study.study` and `layerfold.report`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from layerfold import __version__
from layerfold.cli import compress, export, measure, plan, push, recover, report, search, study
from layerfold.cli.command import Command, group
from layerfold.errors import LayerfoldError


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerfold {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Make decoder language models smaller by their layers, and measure what that cost."""


app = group(
    lambda: {
        "compress": compress.app,
        "search": search.app,
        "plan": plan.command,
        "recover": recover.command,
        "export": Command(export.export),
        "check": Command(export.check),
        "push": Command(push.push),
        "eval": Command(measure.evaluate),
        **study.commands,
        "report": Command(report.report),
        "doctor": Command(measure.doctor),
    },
    _root,
)


_USAGE: Any = typer.BadParameter.__mro__[1]
"""What a command that is typed wrongly raises: click's, or, in newer typers, its copy in typer."""

_SYNONYMS = {"layer": "block", "layers": "blocks"}
"""Words that other tools use for options, and ours."""


def main() -> None:
    """Run a command. A `LayerfoldError`, or a command typed wrongly, gives one line and exit code 2."""
    try:
        status = app(standalone_mode=False)
    except LayerfoldError as error:
        _refuse(str(error))
    except _USAGE as error:
        if error.ctx is None or error.message == error.ctx.get_help():  # a group of commands without a command
            error.show()
            raise SystemExit(error.exit_code) from None
        _refuse(usage(error))
    except typer.Abort:
        print("layerfold: stopped", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for that
            raise
        asked = ". ".join(str(error).split(". ")[:2])
        fits = "--offload always, --dtype bfloat16, --device cpu"
        _refuse(f"{asked}; accepted: {fits}; with recover --set gradient_checkpointing=true or --set batch_size=1")
    raise SystemExit(status if isinstance(status, int) else 0)


def _refuse(said: str) -> NoReturn:
    print(f"layerfold: {' '.join(said.split())}", file=sys.stderr)
    raise SystemExit(2) from None


def usage(error: Any) -> str:
    """Return what is wrong with a command as typed, with the nearest accepted word, or all of them."""
    command, root = error.ctx.command, error.ctx.find_root().command_path
    name = error.ctx.command_path.removeprefix(root).strip()
    if hasattr(error, "possibilities"):
        options = [option for each in command.get_params(error.ctx) for option in each.opts if option.startswith("-")]
        said = f"no option {_one_of(error.option_name, options)}"
    else:
        said = error.format_message().replace("Value error, ", "").rstrip(".")
        if hasattr(command, "commands") and "?" not in said:  # none of them is near
            said = f"{said}; accepted: {', '.join(sorted(command.commands))}"
    return f"{name}: {said}" if name else said


def _one_of(received: str, options: Sequence[str]) -> str:
    """Return the tail of a message: the nearest options, or all of them if none is near."""
    # Without the dashes, which all of them have in common.
    names = {option.lstrip("-"): option for option in options}
    plain = received.lstrip("-")
    ours = _SYNONYMS.get(plain, plain)
    near = [name for name in names if len(ours) > 2 and name.startswith(ours)]
    near = near or difflib.get_close_matches(plain, names, n=1)
    if near:
        return f"{received!r}; did you mean {' or '.join(repr(names[name]) for name in near)}?"
    return f"{received!r}; accepted: {', '.join(sorted(options))}"
