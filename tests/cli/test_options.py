"""Commands made from dataclasses: their options are the fields, and help imports no torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import pytest

import layerfold as package
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import Format
from layerfold.checkpoint.weights import DTYPES
from layerfold.cli import options, recover
from layerfold.cli.declared import declared, methods
from layerfold.errors import InputError
from layerfold.evaluators.base import Protocols
from layerfold.methods import METHODS, Collapse, Drop, Merge, Method, Prune, Share, Thin
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder
from layerfold.planning import Plan
from layerfold.recovery import RECOVERIES, Recovery
from layerfold.repair.repair import Level
from layerfold.search import DropSearch, WindowSearch
from layerfold.study.recipe import PRESETS

DATACLASSES = [*METHODS.values(), DropSearch, WindowSearch, Plan, Recovery]


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Keep every other block.

    Attributes:
        first_block: index of the first block that stays.
        pace: ``slow``, or ``fast`` with `first_block` 0.
        dry: change nothing.
    """

    first_block: int = 0
    pace: Literal["slow", "fast"] = "slow"
    dry: bool = False
    name: ClassVar[str] = "toy"

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        return {"name": self.name, "first_block": self.first_block, "pace": self.pace, "dry": self.dry}

    def apply(self, decoder: Decoder, calibration: Any) -> Notes:
        if not self.dry:
            decoder.keep_(list(range(self.first_block, decoder.n_blocks, 2)))
        return {}


def test_a_method_of_the_registry_has_its_command(
    layerfold: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "toy" not in layerfold("compress", "--help").out
    monkeypatch.setitem(METHODS, "toy", Toy)
    assert "toy       Keep every other block.\n" in layerfold("compress", "--help").out
    said = " ".join(layerfold("compress", "toy", "--help").out.split())
    assert "--first-block <int> Index of the first block that stays. [default: 0]" in said
    assert "--pace <slow|fast> slow, or fast with --first-block 0. [default: slow]" in said
    assert "--dry Change nothing. --format" in said
    words = ("compress", "toy", "--model", model, "--output-dir", tmp_path / "out")
    done = layerfold(*words, "--first-block", 1, "--pace", "fast")
    assert done.code == 0, done.err
    (step,) = load(tmp_path / "out").provenance.steps
    assert step["method"] == {"name": "toy", "first_block": 1, "pace": "fast", "dry": False}
    assert step["kept_blocks"] == [1, 3]
    assert layerfold(*words, "--pace", "fats").err == (
        "layerfold: compress toy: Invalid value for '--pace': 'fats' is not one of 'slow', 'fast'\n"
    )


GIVEN: list[tuple[str, Any]] = [
    ("compress merge", Merge(n=3, align="none", anchor="last", tie=True)),
    ("compress merge", Merge(groups="0-1,2-3", average="fitted")),
    ("compress collapse", Collapse(n=2, average="fitted")),
    ("compress collapse", Collapse(groups="1-2", align="none", anchor="middle")),
    ("compress drop", Drop(random=2, part="ffn", seed=3)),
    ("compress drop", Drop(fraction=0.25)),
    ("compress drop", Drop(every=3, part="attention")),
    ("compress drop", Drop(blocks="1,2")),
    ("compress prune", Prune(nonzero="50%", criterion="wanda", scope="row", parts="ffn")),
    ("compress prune", Prune(sparsity=0.25, structure="neurons+heads", criterion="taylor")),
    ("compress prune", Prune(sparsity=0.25, structure="neurons", uniform=True, multiple_of=8)),
    ("compress share", Share(k=2, rank=5, base="mean", init="svd", ranks="allotted", align="none", anchor="last")),
    ("compress share", Share(window="1:2")),
    ("compress thin", Thin(heads="4,0,2,1", neurons="64,0,128,1")),
    ("search drop", DropSearch(remove=(2, 3), strategy="beam", width=2, race=True, objective="kl", corpus="text")),
    ("search drop", DropSearch(remove=(2, 2), part="ffn", tokens=3, test_tokens=4, context=5, rounds=6, seed=7)),
    ("search drop", DropSearch(objective="repaired", finalists=2, calibration_tokens=3)),
    ("search window", WindowSearch(k=(2, 3), share=Share(rank=5, base="anchor"), race=True, objective="kl", seed=1)),
    ("search window", WindowSearch(corpus="text", calibration_tokens=3, tokens=4, test_tokens=5, context=6)),
    ("plan", Plan(parameters="80%", points=1, finalists=3, corpus="text", calibration_tokens=4, repair_tokens=5)),
    ("plan", Plan(speedup=1.5, tokens=6, test_tokens=7, rounds=8, seed=9)),
    ("plan", Plan(perplexity="+10%", uniform=True, multiple_of=8)),
]
"""Commands, and what their options are to make; between them every field is given that is an option."""


@pytest.mark.parametrize(("command", "wanted"), GIVEN, ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_reaches_its_field(
    layerfold: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, wanted: Any
) -> None:
    reached = []

    def reach(*made: Any, **_: Any) -> None:
        reached.extend(each for each in made if type(each) is type(wanted))
        raise InputError("reached")

    monkeypatch.setattr("layerfold.api.compress", reach)
    for each in (DropSearch, WindowSearch, Plan):
        monkeypatch.setattr(each, "__call__", reach)
    done = layerfold(*command.split(), "--model", model, *words(wanted), "--output-dir", tmp_path / "out")
    assert done.err == "layerfold: reached\n"
    assert reached == [wanted]


def words(configured: Any) -> Iterator[str]:
    """The options that set what is not a default."""
    for field in fields(configured):
        value = getattr(configured, field.name)
        if field.name == "share":
            yield from words(value)
        elif value != field.default:
            yield f"--{field.name.replace('_', '-')}"
            if value is not True:
                yield "..".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_every_field_that_is_an_option_is_tried() -> None:
    tried = {(type(wanted), word) for _, wanted in GIVEN for word in words(wanted) if word.startswith("--")}
    not_options = {(Plan, "--rivals"), (WindowSearch, "--share")}
    for each in (*METHODS.values(), DropSearch, WindowSearch, Plan):
        for field in fields(each):  # type: ignore[arg-type]
            option = (each, f"--{field.name.replace('_', '-')}")
            assert (option in tried) == (option not in not_options), option


@pytest.mark.parametrize("dataclass", DATACLASSES, ids=lambda each: each.__name__)
def test_what_is_read_from_source_is_what_the_class_has(dataclass: Any) -> None:
    read, hints = declared(dataclass.__module__, dataclass.__name__), get_type_hints(dataclass)
    assert read.summary == inspect.getdoc(dataclass).partition("\n\n")[0].replace("\n", " ")
    assert list(read.fields) == [field.name for field in fields(dataclass)]
    for field in fields(dataclass):
        found = read.fields[field.name]
        assert found.help.endswith("."), field.name
        assert len(found.help) <= 160, field.name
        if not is_dataclass(hints[field.name]):
            assert found.annotation == hints[field.name]
            assert found.default == field.default or (found.default is field.default is MISSING)


def test_choices_are_those_of_the_modules_that_read_them() -> None:
    assert options.Format == Format
    assert get_args(options.Form) == (*get_args(Format), "peft", "gguf")
    assert set(get_args(options.SaveDtype)) == set(DTYPES)
    assert options.Level == Level
    assert options.Protocols == Protocols
    assert get_args(options.Preset) == tuple(PRESETS)
    assert get_args(recover.RecoveryName) == tuple(RECOVERIES)
    assert list(methods()) == list(METHODS)


def test_help_and_words_typed_wrongly_import_neither_torch_nor_pydantic() -> None:
    """In a process of its own: this one has imported both."""
    script = """
import sys
from layerfold.cli import main
for words in ("--version", "", "--help", "compress --help", "compress share --help", "search window --help",
              "plan --help", "recover --help", "study --help", "compress merge --grops 1-4", "compress fold"):
    sys.argv = ["layerfold", *words.split()]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == (0 if words.startswith("--version") or words.endswith("--help") else 2), words
print(sorted({"torch", "transformers", "numpy", "pydantic", "rich", "wrapt"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == (f"layerfold {package.__version__}", "[]")
    assert "  collapse  Replace each group of blocks by one" in done.stdout
    assert "did you mean '--groups'?" in done.stderr
