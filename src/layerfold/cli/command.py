"""Commands made when they are called, and options made from the fields of a dataclass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from inspect import Parameter
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from layerfold.cli import options
from layerfold.cli.declared import Declaration, Declared
from layerfold.errors import InputError

SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
Options = Callable[[], Iterable[Parameter]]


@dataclass(frozen=True)
class Command:
    """A function as a command: its parameters are options, and so are the settings of a dataclass that it takes.

    Attributes:
        function: runs the command; what it returns is the exit status.
        options: return the options after `model` that reach the function's ``**settings``. One that has the name of a
            parameter takes its place. Called only when the command is.
        help: what the command does; by default the function's docstring.
        without: parameters that are no options of this command.
        defaults: defaults of parameters where this command has others.
    """

    function: Callable[..., int | None]
    options: Options = tuple
    help: str = ""
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] | None = None

    @property
    def computes(self) -> bool:
        """Whether the command loads a model to compute with, so that it takes a device and a dtype."""
        return "trust_remote_code" in inspect.signature(self.function).parameters

    @property
    def text(self) -> str:
        """What the command does."""
        return self.help or inspect.getdoc(self.function) or ""

    def made(self, name: str) -> Any:
        """Return the command as typer runs it."""

        def run(**values: Any) -> None:
            if not self.computes:
                self.function(**values)
                return
            from layerfold.environment import placed

            with placed(*(values.pop(name) for name in options.PLACES)):
                self.function(**values)

        run.__doc__ = self.text
        run.__signature__ = inspect.Signature(list(self._parameters()))  # type: ignore[attr-defined]
        app = typer.Typer(**SETTINGS)
        app.command(name)(run)
        return typer.main.get_command(app)

    def _parameters(self) -> Iterator[Parameter]:
        changed = self.defaults or {}
        others = {each.name: each for each in self.options()}
        for own in inspect.signature(self.function, eval_str=True).parameters.values():
            if own.kind is not Parameter.VAR_KEYWORD and own.name not in {*self.without, *others}:
                own = own.replace(kind=Parameter.KEYWORD_ONLY)
                yield own.replace(default=changed[own.name]) if own.name in changed else own
            if own.name == "model":
                yield from others.values()
        if self.computes:
            for name, kind in options.PLACES.items():
                yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)


Entry = Command | typer.Typer


class _Made(Mapping[str, Any]):
    """Commands by name, each made when it is asked for: a list of commands needs none of their options."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        entry = self.entries[name]
        return entry.made(name) if isinstance(entry, Command) else typer.main.get_command(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def group(entries: Callable[[], Mapping[str, Entry]], callback: Callable[..., None]) -> typer.Typer:
    """Return a group of commands.

    Args:
        entries: return the commands by name, when the group is called.
        callback: its parameters are the group's own options, its docstring the group's help.
    """

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.entries = entries()
            self.commands = cast(Any, _Made(self.entries))

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            texts = {
                name: entry.text if isinstance(entry, Command) else inspect.getdoc(entry.info.callback)
                for name, entry in self.entries.items()
            }
            room = formatter.width - 6 - max(map(len, texts))
            with formatter.section("Commands"):
                formatter.write_dl(
                    [(name, TyperCommand(name, help=text).get_short_help_str(room)) for name, text in texts.items()]
                )

    # Without a default typer imports pydantic to learn that `--help` was not given.
    defaults = {"default_map": {"help": False}}
    return typer.Typer(cls=Group, callback=callback, no_args_is_help=True, context_settings=defaults, **SETTINGS)


def field_options(
    declared: Declared, names: Iterable[str] | None = None, *, unset: bool = False, without: Iterable[str] = ()
) -> Iterator[Parameter]:
    """Yield an option for each field of a dataclass.

    Args:
        names: which fields; all of them where it is None.
        unset: options that are not given are None, whatever the field's default.
        without: fields that are no options.
    """
    for name in declared.fields if names is None else names:
        if name not in without:
            yield _option(name, declared.fields[name], declared.fields, unset)


def _option(name: str, field: Declaration, fields: Iterable[str], unset: bool) -> Parameter:
    flag = _flag(name)
    read: Callable[[Any], Any] | None = None
    kind, default, said = field.annotation, field.default, _help(field.help, fields)
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)  # the first is what is typed
    if kind == tuple[int, int]:
        kind, read, default = str, _range_of(flag), range_text(default)
    elif get_origin(kind) is tuple:
        kind, read, default, said = list[str], _several, None, f"{said.rstrip('.')}; may be repeated."
    if default is MISSING:
        default = Parameter.empty
    elif unset or default is None:
        kind, default = kind | None, None
    return option(name, kind, said, default, read)


def _help(line: str, fields: Iterable[str]) -> str:
    """Turn a docstring's line on a field into help: fields become options, and code loses its quotes."""
    line = re.sub(r"(?<!`)`(\w+)`(?!`)", lambda found: _flag(found[1]) if found[1] in fields else found[1], line)
    return (line[:1].upper() + line[1:]).replace("``", "")


def option(name: str, kind: Any, help: str, default: Any = None, read: Callable[..., Any] | None = None) -> Parameter:
    """Return an option of a command, with its type, help, default, and a reader of the text that is typed."""
    info = typer.Option(_flag(name), help=help, callback=read)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _several(values: list[str] | None) -> tuple[str, ...] | None:
    return tuple(values) if values else None


def range_text(numbers: tuple[int, int]) -> str:
    """Return a range as it is typed: one number where it holds one."""
    first, last = numbers
    return f"{first}" if first == last else f"{first}..{last}"


def _range_of(flag: str) -> Callable[[str], tuple[int, int]]:
    def read(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", text)
        if not match:
            raise InputError(f"{flag} {text!r}; accepted: how many, as 2 or 1..3")
        return int(match[1]), int(match[2] or match[1])

    return read
