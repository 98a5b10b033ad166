"""Rows of a study that need no model; and that no text a variant is made with is text that a task tests on."""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import Write, prose, tiny

from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, RecipeError
from layerfold.evaluators import Imdb, Rouge, Score
from layerfold.records import BASE_LABEL, read_results, write_results
from layerfold.report import print_report, study_report, write_csv, write_page
from layerfold.report.columns import columns
from layerfold.report.report import MISSING
from layerfold.report.study import table
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.study import Study
from layerfold.text import sources

REVIEWS = [
    (f"{'the good film' if number % 2 else 'a bad storm'} {prose(6, number)}", number % 2) for number in range(24)
]
PAPERS = [(f"Paper {number}. {prose(8, number)}. A storm. The film. Winter came.", "A storm.") for number in range(4)]
VARIANTS = [{"label": "halved", "drop": {"blocks": "1,3"}}]
BASELINES = ("bag of words", "lead-3", "random sentences")
OWNER = {"bag of words": "imdb", "lead-3": "rouge", "random sentences": "rouge"}


@pytest.fixture(scope="module")
def base() -> Model:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def _tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("reviews", "papers"):
        (folder / name).mkdir()
    for split, rows in (("train", REVIEWS[:16]), ("test", REVIEWS[16:])):
        with (folder / "reviews" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    lines = [json.dumps({"document": document, "summary": summary}) for document, summary in PAPERS]
    (folder / "papers" / "test.jsonl").write_text("\n".join(lines))
    reviews, papers = str(folder / "reviews"), str(folder / "papers")
    return [{"imdb": {"data": reviews, "body": False}}, {"rouge": {"data": papers, "new_tokens": 4}}]


@pytest.fixture
def tasks(_tasks: list[Any]) -> list[Any]:
    """The two tasks on a few texts."""
    return copy.deepcopy(_tasks)


def recipe(tasks: list[Any], **changes: Any) -> Recipe:
    return read_recipe({"variants": VARIANTS, "evaluate": ["size", *tasks]} | changes)


def run(study: Study) -> list[tuple[str, str]]:
    return [(record.label, record.evaluator) for record in study.run()]


@contextmanager
def asking() -> Iterator[list[str]]:
    """Yield a list with one entry for each time that an evaluator measures its baselines."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Imdb, Rouge):

            def baselines(self: Any, *arguments: Any, original: Any = kind.baselines) -> dict[str, Score]:
                found.append(self.name)
                scores: dict[str, Score] = original(self, *arguments)
                return scores

            patch.setattr(kind, "baselines", baselines)
        yield found


@pytest.fixture
def asked() -> Iterator[list[str]]:
    with asking() as found:
        yield found


@pytest.fixture(scope="module")
def whole(base: Model, _tasks: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Any, Any]:
    study = Study(recipe(_tasks), tmp_path_factory.mktemp("done") / "run", base=base)
    with asking() as asked:
        return study, run(study), asked


@pytest.fixture
def done(whole: tuple[Study, Any, Any], tmp_path: Path) -> Path:
    """The folder of a study that was run to its end."""
    return shutil.copytree(whole[0].output_dir, tmp_path / "run")


def test_baselines_stand_once_after_the_variants(base: Model, whole: tuple[Study, Any, Any]) -> None:
    study, order, asked = whole
    assert sorted(order) == sorted(
        [(label, name) for label in (BASE_LABEL, "halved") for name in ("size", "imdb", "rouge")] + list(OWNER.items())
    )
    assert asked == ["imdb", "rouge"]
    assert study.labels == (BASE_LABEL, "halved")
    results = study.results()
    assert results.labels == (BASE_LABEL, "halved", *BASELINES)
    assert {place for place in results.records if place[0] in BASELINES} == set(OWNER.items()), "and no other figure"
    _, imdb, rouge = study.recipe.evaluate
    scores = {**imdb.baselines(base), **rouge.baselines(base)}
    for label, name in OWNER.items():
        record = results.records[label, name]
        assert record.score == json.loads(json.dumps(scores[label].to_json()))
        assert record.notes == {}
        assert record.seconds >= 0
    assert "versus_base" in results.score("halved", "imdb")  # type: ignore[operator]
    document = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert [each["label"] for each in document["variants"]] == list(results.labels)
    assert document["variants"][-1]["scores"].keys() == {"rouge"}


def test_there_are_none_without_such_tasks_and_before_anything_is_measured(
    base: Model, tasks: list[Any], done: Path, tmp_path: Path
) -> None:
    plain = Study(recipe([]), done, base=base)
    assert run(plain) == []
    assert plain.results().labels == (BASE_LABEL, "halved")
    one = Study(recipe(tasks[1:]), done, base=base)
    assert one.results().labels == (BASE_LABEL, "halved", "lead-3", "random sentences")
    assert Study(recipe(tasks), tmp_path / "new", base=base).results().labels == (BASE_LABEL, "halved")


def test_running_again_measures_none_of_them(base: Model, tasks: list[Any], done: Path, asked: list[str]) -> None:
    assert run(Study(recipe(tasks), done, base=base)) == []
    other = [{"label": "other", "drop": {"blocks": "0"}}]
    assert {label for label, _ in run(Study(recipe(tasks, variants=other), done, base=base))} == {"other"}
    assert run(Study(recipe(tasks, variants=[]), done, base=tiny("gpt2", seed=1))) == [
        (BASE_LABEL, name) for name in ("size", "imdb", "rouge")
    ], "no figure of theirs is the base's"
    assert asked == []


def test_stopping_amid_them_loses_none(
    base: Model, tasks: list[Any], tmp_path: Path, whole: tuple[Study, Any, Any], asked: list[str]
) -> None:
    for record in Study(recipe(tasks, variants=[]), tmp_path / "run", base=base).run():
        if record.label == "bag of words":
            break
    asked.clear()
    again = Study(recipe(tasks, variants=[]), tmp_path / "run", base=base)
    assert run(again) == [("lead-3", "rouge"), ("random sentences", "rouge")]
    assert asked == ["rouge"]
    for place in OWNER.items():
        assert again.results().records[place].score == whole[0].results().records[place].score


def test_a_damaged_one_is_measured_again(
    base: Model, tasks: list[Any], done: Path, whole: tuple[Study, Any, Any], asked: list[str]
) -> None:
    key = whole[0].results().records["random sentences", "rouge"].key
    path = done / "records" / f"rouge-{key[:24]}.json"
    path.write_text(path.read_text()[:40])
    assert ("random sentences", "rouge") in run(Study(recipe(tasks), done, base=base))
    assert asked == ["rouge"]


@pytest.mark.parametrize(
    ("task", "changes", "again"),
    [
        (0, {"train_rows": 12}, ["bag of words"]),
        (0, {"seed": 3}, ["bag of words"]),
        (0, {"eval_batch_size": 2}, []),
        (1, {"limit": 2}, ["lead-3", "random sentences"]),
        (1, {"protocol": "published"}, ["lead-3", "random sentences"]),
        (1, {"batch_size": 2}, []),
    ],
    ids=str,
)
def test_they_are_measured_again_where_it_matters(
    task: int, changes: dict[str, Any], again: list[str], base: Model, tasks: list[Any], done: Path
) -> None:
    ((name, settings),) = tasks[task].items()
    tasks[task] = {name: settings | changes}
    measured = run(Study(recipe(tasks, variants=[]), done, base=base))
    assert {label for label, _ in measured} - {BASE_LABEL} == set(again)


@pytest.mark.parametrize("where", ["recipe", "evaluator"])
def test_another_seed_draws_other_sentences_and_changes_no_other_figure(
    where: str, base: Model, tasks: list[Any], tmp_path: Path
) -> None:
    found = {}
    settings = tasks[1]["rouge"]
    for seed in (0, 1):
        chosen = [{"rouge": settings | {"seed": seed}}] if where == "evaluator" else [{"rouge": settings}]
        seeds = {"seed": seed} if where == "recipe" else {}
        study = Study(recipe(chosen, variants=[], **seeds), tmp_path / "run", base=base)
        run(study)
        results = study.results()
        found[seed] = [results.score(label, "rouge") for label in ("random sentences", BASE_LABEL, "lead-3")]
    assert found[0][0]["summaries"] != found[1][0]["summaries"]  # type: ignore[index]
    assert found[0][1:] == found[1][1:]


# How they are shown


def test_what_they_have_not_is_a_dash(whole: tuple[Study, Any, Any], tmp_path: Path) -> None:
    results, folder = whole[0].results(), tmp_path
    write_results(results, folder)
    read = read_results(folder)
    assert read.labels == results.labels
    for shown in (table(read), table(read, detail=True)):
        rows = dict(shown.rows)
        assert list(rows) == list(results.labels)
        for label, owner in OWNER.items():
            for column, cell in zip(shown.columns, rows[label], strict=True):
                compared = getattr(column, "key", "") == "versus_base"
                assert (cell.value == MISSING) == (getattr(column, "evaluator", None) != owner or compared)
        assert not any(cell.value == MISSING for cell in rows["halved"])

    write_csv(study_report(read), folder / "results.csv")
    with (folder / "results.csv").open(newline="") as file:
        figures = {row.pop("label"): row for row in csv.DictReader(file)}
    assert list(figures) == list(results.labels)
    names = {(column.evaluator, column.key): column.name for column in columns(read)}
    for label, owner in OWNER.items():
        for key, own in names.items():
            if key in ((owner, "value"), (owner, "rougeL")):
                assert float(figures[label][own]) == results.score(label, owner)["value"]  # type: ignore[index]
    for label, owner in OWNER.items():
        filled = {name for name, figure in figures[label].items() if figure}
        assert filled
        assert all(name.startswith(owner) for name in filled)
    assert all(figures["halved"].values())

    console = Console(width=200, file=io.StringIO())
    print_report(study_report(read), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for label in BASELINES:
        (line,) = (line for line in lines if line.strip().startswith(label))
        assert line.count(MISSING) >= 4
        assert "nan" not in line

    write_page(study_report(read), folder / "report.html")
    page = (folder / "report.html").read_text()
    assert all(label in page for label in BASELINES)
    assert "1 compressed variant of" in page, "they are no variants"
    write_page(study_report(read), folder / "again.html")
    assert (folder / "again.html").read_text() == page


@pytest.mark.parametrize("label", BASELINES)
def test_no_variant_may_be_called_as_they_are(label: str, tasks: list[Any]) -> None:
    variants = [{"label": label, "drop": {"blocks": "1"}}]
    with pytest.raises(RecipeError) as caught:
        recipe(tasks, variants=variants)
    assert str(caught.value) == f"the recipe: label {label!r} is that of a baseline row of {OWNER[label]}"
    assert recipe([], variants=variants).variants[0].label == label, "where there are none it is free"


# What is made with may not be what is tested on


MADE = {
    "calibration": (0.22, {"variants": [{"label": "merged", "merge": {"n": 2}}]}),
    "training": (0.5, {"variants": [], "recovery": {"finetune": {"tokens": 128, "learning_rate": 1e-3}}}),
    "validation": (0.15, {"variants": [], "recovery": {"finetune": {"tokens": 128, "learning_rate": 1e-3}}}),
    "selection": (0.15, {"variants": [{"label": "shared", "share": {"k": 2, "rank": 2}}]}),
    "distillation": (0.5, {"variants": [{"label": "pupil", "student": {"tokens": 128, "learning_rate": 1e-3}}]}),
}
TESTED = {"imdb": REVIEWS[20][0], "rouge": PAPERS[2][0]}


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """Say that a text's hash lies at this place from 0 to 1."""
    hashed = sources._place

    def put(document: str, place: float) -> None:
        places = {sources.same(document): place}
        monkeypatch.setattr(sources, "_place", lambda text: places.get(sources.same(text), hashed(text)))

    return put


@pytest.mark.parametrize("task", [0, 1], ids=["imdb", "rouge"])
@pytest.mark.parametrize("made", MADE)
def test_text_that_variants_are_made_with_may_not_be_tested_on(
    made: str, task: int, base: Model, tasks: list[Any], write: Write, tmp_path: Path, put: Callable[[str, float], None]
) -> None:
    place, changes = MADE[made]
    document = list(TESTED.values())[task]
    put(document, place)
    documents = [f"{prose(30, seed)} {seed}" for seed in range(60)]
    documents[2] = document.replace(" ", "  ")  # the same but for white space
    source = str(write("made/text.txt", "\n\n".join(documents)))
    if "recovery" in changes:
        changes = changes | {"recovery": {"finetune": changes["recovery"]["finetune"] | {"corpus": source}}}
    overlapping = recipe(tasks[task : task + 1], calibration={"corpus": source, "tokens": 512}, **changes)
    with pytest.raises(CorpusError, match=r"^1 documents stand in both .* the texts must be disjoint") as caught:
        run(Study(overlapping, tmp_path / "run", base=base))
    assert document[:30] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "records").exists(), "nothing was measured"


@pytest.mark.parametrize("task", [0, 1], ids=["imdb", "rouge"])
def test_text_that_nothing_is_made_with_may_be(
    task: int, base: Model, tasks: list[Any], write: Write, tmp_path: Path, put: Callable[[str, float], None]
) -> None:
    documents = [f"{prose(30, seed)} {seed}" for seed in range(60)]
    documents[0] = list(TESTED.values())[task]
    put(documents[0], 0.05)  # a test document of that corpus too
    source = str(write("made/text.txt", "\n\n".join(documents)))
    made = {"variants": [{"label": "merged", "merge": {"n": 2}}], "calibration": {"corpus": source, "tokens": 512}}
    done = run(Study(recipe(tasks[task : task + 1], **made), tmp_path / "run", base=base))
    assert ("merged", ["imdb", "rouge"][task]) in done


def test_a_test_text_beyond_those_that_are_scored_is_one_all_the_same(
    base: Model, tasks: list[Any], write: Write, tmp_path: Path, put: Callable[[str, float], None]
) -> None:
    tasks[0]["imdb"]["test_rows"] = 1
    for text, _ in REVIEWS[16:18]:
        put(text, 0.22)
        documents = [f"{prose(30, seed)} {seed}" for seed in range(60)]
        documents[2] = text
        source = str(write("made/text.txt", "\n\n".join(documents)))
        made = {"variants": [{"label": "merged", "merge": {"n": 2}}], "calibration": {"corpus": source, "tokens": 512}}
        with pytest.raises(CorpusError, match="stand in both"):
            run(Study(recipe(tasks[:1], **made), tmp_path / "run", base=base))
