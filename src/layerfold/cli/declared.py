"""Dataclasses as their source declares them: fields, choices, defaults and the lines of their docstrings.

The modules of methods and searches import torch, which takes seconds and which help and refusals do not need. Here
they are parsed, not imported, and only the names that a field needs are evaluated.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import layerfold

_PACKAGE = Path(layerfold.__file__).parent


class Declaration(NamedTuple):
    """A field: its type, its default (`MISSING` where it must be given), and what the docstring says of it."""

    annotation: Any
    default: Any
    help: str


class Declared:
    """A dataclass. Its class variables are attributes of this object too."""

    def __init__(self, node: ast.ClassDef, module: Source) -> None:
        self._node, self._module = node, module
        self._assigned = {
            each.target.id: each
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        }

    def __getitem__(self, parameters: Any) -> Declared:
        """Return a generic class whatever its parameters: ``Search[Found]`` has the fields of ``Search``."""
        return self

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, in one line."""
        return " ".join((ast.get_docstring(self._node) or "").partition("\n\n")[0].split())

    @cached_property
    def fields(self) -> dict[str, Declaration]:
        """The fields by name, in the order of the constructor."""
        found: dict[str, Declaration] = {}
        for base in map(self._module.evaluate, self._node.bases):
            found |= base.fields if isinstance(base, Declared) else {}
        said = _attributes(ast.get_docstring(self._node) or "")
        found = {name: field._replace(help=said.get(name, field.help)) for name, field in found.items()}
        for name, node in self._assigned.items():
            if not ast.unparse(node.annotation).startswith("ClassVar"):
                default = MISSING if node.value is None else self._module.evaluate(node.value)
                default = default.default if isinstance(default, Field) else default
                line = said.get(name, found[name].help if name in found else "")
                found[name] = Declaration(self._module.evaluate(node.annotation), default, line)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (node := self._assigned.get(name)) is None or node.value is None:
            raise AttributeError(name)
        return self._module.evaluate(node.value)


class Source(dict[str, Any]):
    """The names of a module, evaluated when they are first asked for."""

    def __init__(self, file: Path) -> None:
        self._nodes: dict[str, ast.stmt] = {}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            match node:
                case ast.ImportFrom():
                    self._nodes |= {each.asname or each.name: node for each in node.names}
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    self._nodes[name] = node
                case ast.ClassDef(name=name):
                    self._nodes[name] = node

    def __missing__(self, name: str) -> Any:
        match node := self._nodes[name]:
            case ast.ImportFrom(module=str(module), names=names):
                (original,) = (each.name for each in names if name in (each.asname, each.name))
                self[name] = _imported(module, original)
            case ast.ClassDef():
                self[name] = Declared(node, self)
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                self[name] = self.evaluate(value)
            case _:
                raise KeyError(name)
        return self[name]

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def evaluate(self, expression: ast.expr) -> Any:
        """Return the value of an expression of this module; classes of layerfold in it are `Declared`."""
        # `self` is both scopes: a comprehension in it looks names up in the global one.
        return eval(compile(ast.Expression(expression), "<declared>", "eval"), self, self)


def declared(module: str, name: str) -> Declared:
    """Return a dataclass of a module, which is not imported for it."""
    found: Declared = _source(module)[name]
    return found


def methods() -> Mapping[str, Declared]:
    """Return what is in the registry of methods, by name: the registry itself where a program has imported it."""
    if (package := sys.modules.get("layerfold.methods")) is None:
        registry: Mapping[str, Declared] = _source("layerfold.methods")["METHODS"]
        return registry
    return {name: declared(each.__module__, each.__name__) for name, each in package.METHODS.items()}


@cache
def _source(module: str) -> Source:
    return Source(_file(module) or Path(str(sys.modules[module].__file__)))


def _file(module: str) -> Path | None:
    """Return the file of a module of layerfold; asking Python for it would import the packages around it."""
    package, *parts = module.split(".")
    path = _PACKAGE.joinpath(*parts)
    files = (path.with_suffix(".py"), path / "__init__.py") if package == layerfold.__name__ else ()
    return next((file for file in files if file.is_file()), None)


def _imported(module: str, name: str) -> Any:
    if _file(f"{module}.{name}"):
        return _source(f"{module}.{name}")
    return _source(module)[name] if _file(module) else getattr(importlib.import_module(module), name)


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's section `Attributes`, each in one line."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(line.split()) for name, line in entries}
