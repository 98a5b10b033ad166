"""How the house is laid out: who may import whom, how long a file may be, what is public."""

from __future__ import annotations

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import layerfold

SOURCE = Path(layerfold.__file__).parent
MAY_IMPORT_TRANSFORMERS = {"checkpoint", "recovery", "evaluators.classification", "inference.captured"}
PUBLIC = """
Calibration Collapse Decoder Distill Drop DropSearch Evaluator Finetune Generation Harness Imdb InputError Latency
LayerfoldError LowRank Merge Method Model Notes Perplexity Plan Prune Recipe Rouge Score Share Size Steps Study
Thin WindowSearch compress default_recipe evaluate load read_recipe recover register
"""

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


def transformers_imports(module: str, source: str) -> list[str]:
    """What a module that may not imports of transformers when it runs."""
    if any(module == allowed or module.startswith(f"{allowed}.") for allowed in MAY_IMPORT_TRANSFORMERS):
        return []
    names = imports(source, run_time_only=True)
    return sorted(name for name in names if name.split(".")[0] == "transformers")


def test_few_modules_import_transformers() -> None:
    found = {module: transformers_imports(module, path.read_text()) for module, path in FILES.items()}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("model.decoder", "try:\n    import transformers\nexcept ImportError:\n    pass", ["transformers"]),
        ("text.windows", "from transformers.utils import logging", ["transformers.utils"]),
        ("api", "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers", ["transformers"]),
        ("model.decoder", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel", []),
        ("checkpoint.load", "def f():\n    import transformers\nfrom layerfold import files", []),
    ],
)
def test_imports_of_transformers_are_found(module: str, source: str, found: list[str]) -> None:
    assert transformers_imports(module, source) == found


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package in a folder, by the contracts of pyproject.toml."""
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_contracts_are_kept_and_can_be_broken(tmp_path: Path) -> None:
    assert linted(SOURCE.parents[1]).returncode == 0
    shutil.copytree(SOURCE, tmp_path / "src" / "layerfold", ignore=shutil.ignore_patterns("pocket", "__pycache__"))
    shutil.copy(SOURCE.parents[1] / "pyproject.toml", tmp_path)
    broken = {
        "model.decoder -> layerfold.checkpoint.load": "import layerfold.checkpoint.load",
        "maths.ridge -> layerfold.model.ffn": "def f():\n    from layerfold.model.ffn import FFN",
        "methods.merge -> layerfold.methods.collapse": "from layerfold.methods.collapse import Collapse",
        "report.terminal -> layerfold.study.recipe": "from layerfold.study.recipe import Recipe",
    }
    for chain, line in broken.items():
        module = chain.partition(" ")[0].replace(".", "/")
        with (tmp_path / "src" / "layerfold" / f"{module}.py").open("a") as file:
            file.write(f"\n{line}\n")
    found = linted(tmp_path)
    assert found.returncode == 1
    assert [chain for chain in broken if f"layerfold.{chain} (l." not in found.stdout] == []


def test_the_root_has_at_most_12_files() -> None:
    assert len([*SOURCE.glob("*.py")]) <= 12


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {name.removeprefix("layerfold.") for name in imports(path.read_text()) if name.startswith("layerfold.")}
        for module, path in FILES.items()
        if module != "__init__"
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


def test_a_file_has_at_most_400_lines() -> None:
    assert {module for module, path in FILES.items() if len(path.read_text().splitlines()) > 400} == set()


def test_what_is_public_is_exactly_this() -> None:
    assert layerfold.__all__ == PUBLIC.split() == sorted(layerfold.__all__)
    for name in PUBLIC.split():
        getattr(layerfold, name)  # the first use imports what it needs,
        assert not isinstance(getattr(layerfold, name), ModuleType)  # and puts no package in the place of a name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = layerfold.lod


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, layerfold; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {script}"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"
