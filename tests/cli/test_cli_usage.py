"""Commands typed wrongly: one line that names what is near, or all that is accepted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from layerfold.cli import app

pytestmark = pytest.mark.usefixtures("offline")


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that name it, groups of commands too."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_names_the_options_near_one_that_it_has_not_or_all_of_them(
    layerfold: Any, words: tuple[str, ...]
) -> None:
    done = layerfold(*words, "--layers", "3")
    named = {option for each in COMMANDS[words].params for option in each.opts if option.startswith("-")} | {"--help"}
    nearest = "did you mean '--blocks'?" if "--blocks" in named else f"accepted: {', '.join(sorted(named))}"
    command = f"{' '.join(words)}: " if words else ""
    assert done.err == f"layerfold: {command}no option '--layers'; {nearest}\n"
    assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("compress drop --layer 3", "compress drop: no option '--layer'; did you mean '--blocks'?"),
        ("compress merge --tei", "compress merge: no option '--tei'; did you mean '--tie'?"),
        (
            "compress merge --repair-token=9",
            "compress merge: no option '--repair-token'; did you mean '--repair-tokens'?",
        ),
        ("study --out runs/a", "study: no option '--out'; did you mean '--output-dir'?"),
        ("doctor -v", "doctor: no option '-v'; accepted: --families, --help, --json"),
        ("compress xyz", "compress: No such command 'xyz'; accepted: collapse, drop, merge, prune, share, thin"),
        ("eval pocket twice", "eval: Got unexpected extra argument(s) (twice)"),
    ],
)
def test_what_is_typed_wrongly_is_said_in_one_line(layerfold: Any, typed: str, said: str) -> None:
    done = layerfold(*typed.split())
    assert done.err == f"layerfold: {said}\n"
    assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize("words", ["", "compress", "search"])
def test_a_group_without_a_command_lists_its_commands(layerfold: Any, words: str) -> None:
    done = layerfold(*words.split())
    assert "Commands:" in done.out + done.err
    assert done.code == 2


def test_help_and_success_exit_with_0(layerfold: Any) -> None:
    assert layerfold("compress", "drop", "--help").code == 0
    assert layerfold("doctor", "--json").code == 0


def test_an_interrupted_command_exits_as_one(layerfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerfold.checkpoint.load.load", interrupted)
    done = layerfold("eval", "pocket")
    assert done.code not in (0, 2)
    assert "Traceback" not in done.err
