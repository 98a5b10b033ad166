"""How the house is laid out: who may import whom, how long a file may be, what is public."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerfold

SOURCE = Path(layerfold.__file__).parent
FLOORS = {
    0: "errors hashes ranking surgeon defaults folders memory network linalg leastsquares statistics logistic progress "
    "records spool units words yamlfiles weightfiles portable readback",
    1: "families ffn attention factored sublayers block readout decoder deltas structure masks stepping compact "
    "checkpoint auto apart",
    2: "textfiles sources corpora examples decoding windows calibration zeroing narrowing sensitivity thinning sharing "
    "scoring hub textsread adapter streaming passing repairing rescaling spans",
    3: "methods evaluators recovery classification",
    4: "building origins presets repair applying rows recipe variants search planning waiting passes replicates "
    "study api",
    5: "report console doctor cli",
    6: "__init__",  # of layerfold itself: above all
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
APART = ("methods", "evaluators")  # one file a method, one an evaluator: none knows another
MAY_IMPORT_TRANSFORMERS = {
    "hub",
    "checkpoint",
    "compact",
    "auto",
    "recovery",
    "classification",
    "weightfiles",
    "readback",
}
PUBLIC = {
    *("Collapse", "Decoder", "Distill", "Drop", "DropSearch", "Finetune", "LowRank", "recover"),
    *(
        "Generation",
        "Harness",
        "Imdb",
        "Latency",
        "LayerfoldError",
        "Rouge",
        "Merge",
        "Model",
        "Perplexity",
        "Plan",
        "Prune",
        "Recipe",
    ),
    *(
        "Score",
        "Share",
        "Size",
        "Steps",
        "Study",
        "WindowSearch",
        "compress",
        "default_recipe",
        "evaluate",
        "load",
        "read_recipe",
    ),
}

# Modules by their path below layerfold: "decoder", "methods.merge", "methods" for a package's __init__.
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def nodes(tree: ast.AST, type_checking: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it is there for type checkers alone."""
    for child in ast.iter_child_nodes(tree):
        inside = type_checking or (is_type_checking(tree) and child in tree.body)  # type: ignore[attr-defined]
        yield child, inside
        yield from nodes(child, inside)


def imports(source: str, run_time_only: bool = False) -> set[str]:
    """Full names of the modules that a module imports, wherever in it that stands."""
    found: set[str] = set()
    for node, type_checking in nodes(ast.parse(source)):
        if type_checking and run_time_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            origin = node.module or ""
            submodules = {f"{origin}.{alias.name}" for alias in node.names}
            inner = {name for name in submodules if name.removeprefix("layerfold.") in FILES}
            found |= inner if inner == submodules else inner | {origin}
    return found


def violations(module: str, source: str) -> list[str]:
    """What in a module's imports breaks the rule between floors."""
    room, _, member = module.partition(".")
    found = []
    for name in sorted(imports(source)):
        if name == "layerfold" and module != "__init__":
            found.append(f"{module} imports layerfold itself")
        elif name.startswith("layerfold."):
            other = name.removeprefix("layerfold.")
            other_room, _, other_member = other.partition(".")
            if FLOOR_OF[other_room] > FLOOR_OF[room]:
                found.append(f"{module} imports {other}, a floor above it")
            elif room in APART and other_room in APART:
                own_base = other_room == room and other_member == "base"
                own_members = other_room == room and not member
                if not (own_base or own_members):
                    found.append(f"{module} imports {other}, beside it")
    if room not in MAY_IMPORT_TRANSFORMERS:
        names = imports(source, run_time_only=True)
        found += [f"{module} imports {name}" for name in names if name.split(".")[0] == "transformers"]
    return found


def test_every_module_has_a_floor() -> None:
    assert {module.partition(".")[0] for module in FILES} - {"pocket"} <= FLOOR_OF.keys()


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_lower_floors_and_none_beside_it(module: str) -> None:
    assert violations(module, FILES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("decoder", "import layerfold.checkpoint.load", "decoder imports hub, a floor above it"),
        ("windows", "from layerfold import study", "windows imports study, a floor above it"),
        ("linalg", "def f():\n    from layerfold.model.decoder import FFN", "linalg imports decoder, a floor above it"),
        ("methods.merge", "from layerfold.methods.collapse import Collapse", "methods.collapse, beside it"),
        ("methods.merge", "from layerfold.methods import METHODS", "merge imports methods, beside it"),
        ("methods.drop", "from layerfold.evaluators.base import Score", "evaluators.base, beside it"),
        ("evaluators.size", "from layerfold.evaluators import latency", "evaluators.latency, beside it"),
        ("evaluators.base", "from layerfold.methods.base import Method", "methods.base, beside it"),
        ("study", "from layerfold import load", "study imports layerfold itself"),
        ("cli", "import layerfold", "cli imports layerfold itself"),
        ("decoder", "try:\n    import transformers\nexcept ImportError:\n    pass", "decoder imports transformers"),
        ("windows", "from transformers.utils import logging", "windows imports transformers.utils"),
        ("api", "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers", "api imports transformers"),
    ],
)
def test_the_rule_can_be_broken(module: str, source: str, said: str) -> None:
    assert [line for line in violations(module, source) if said in line]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods.drop", "from layerfold.methods.base import Method\nfrom layerfold.model.decoder import Decoder"),
        ("methods", "from layerfold.methods.merge import Merge"),
        ("decoder", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("hub", "def f():\n    import transformers\nfrom layerfold import checkpoint"),
    ],
)
def test_the_rule_can_be_kept(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {name.removeprefix("layerfold.") for name in imports(path.read_text()) if name.startswith("layerfold.")}
        for module, path in FILES.items()
        if module != "__init__"
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("module", FILES)
def test_a_file_has_at_most_400_lines(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 400


def test_what_is_public_is_exactly_this() -> None:
    assert set(layerfold.__all__) == PUBLIC
    assert layerfold.__all__ == sorted(layerfold.__all__)
    for name in PUBLIC:
        getattr(layerfold, name)  # the first use imports what it needs,
        assert getattr(layerfold, name).__name__ == name  # which must not put a package in the place of a name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = layerfold.lod


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, layerfold; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {script}"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"
