"""Figures of README and docs: what is out of date, what runs, and that pages show what the results say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from figures import __main__ as command
from figures import blocks, cells, experiments, pages, plots, running
from figures.blocks import plans
from figures.experiments import EXPERIMENTS, ROOT, Experiment

from layerfold.errors import InputError

# What is declared


def test_every_experiment_has_a_key_and_feeds_a_page() -> None:
    keys = [each.key() for each in EXPERIMENTS.values()]
    assert len(set(keys)) == len(keys)
    fed = pages.fed()
    assert set(EXPERIMENTS) - set(fed) == set(), "an experiment that no page shows"
    for block in blocks.BLOCKS.values():
        assert set(block.experiments) <= set(EXPERIMENTS)


def test_every_block_stands_on_a_page_once() -> None:
    found = [name for page in pages.pages() for name in pages.blocks(page)]
    assert sorted(found) == sorted(blocks.BLOCKS)


def test_every_result_is_of_an_experiment_and_says_so() -> None:
    for path in sorted((ROOT / "results").glob("*.json")):
        if path.name != "costs.json":
            assert json.loads(path.read_text())["experiment"] == path.stem
            assert path.stem in EXPERIMENTS


def test_the_estimates_are_within_their_bounds() -> None:
    """Ten hours of one thread for all, of which an hour and a half for README's part."""
    fed = pages.fed()
    minutes = {each.name: each.minutes for each in EXPERIMENTS.values() if each.device != "cuda"}
    assert sum(minutes.values()) <= 600
    assert sum(taken for name, taken in minutes.items() if "README.md" in fed[name]) <= 90


def test_the_pages_show_what_the_results_say() -> None:
    assert [*pages.stale(), *plots.stale()] == []


# What is out of date


def test_a_key_changes_with_all_that_determines_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    study, search = EXPERIMENTS["repair"], EXPERIMENTS["drop-best"]
    before = study.key(), search.key()
    assert replace(study, minutes=1.0, name="other").key() == before[0], "neither the name nor the time"
    assert replace(study, version=2).key() != before[0]
    assert study.key("cuda") != before[0]
    assert replace(search, command=search.command + " --seed 1").key() != before[1]
    with monkeypatch.context() as patched:
        patched.setattr(experiments.reading, "VERSION", 99)
        assert study.key() != before[0]
    monkeypatch.setattr(experiments, "REPAIR", "repair@99")
    assert study.key() != before[0]
    assert search.key() == before[1], "no repair is in it"
    monkeypatch.setitem(experiments.VERSIONS, "drop", "drop-99")
    assert search.key() != before[1]


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("recovery", "repair"),  # of its plan
        ("recovery", "method drop"),
        ("quality", "method merge"),
        ("plan", "race"),
        ("windows", "method share"),
    ],
)
def test_a_key_changes_with_a_version_behind_a_plan_or_a_comparison(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = EXPERIMENTS[name].key()
    monkeypatch.setitem(experiments.VERSIONS, version, "another")
    assert EXPERIMENTS[name].key() != before


def test_a_key_knows_what_a_student_is_made_by(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = EXPERIMENTS["full"].determined()["versions"]
    assert {"distill", "finetune", "drop", "searches", "imdb", "rouge", "latency"} <= versions.keys()


def test_a_key_changes_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    before = EXPERIMENTS["merge"].key()
    monkeypatch.setattr(experiments, "_pocket", lambda: "another")
    assert EXPERIMENTS["merge"].key() != before


# What runs


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own, with results and runs."""
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setattr(running, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(running, "COSTS", tmp_path / "results" / "costs.json")
    monkeypatch.setattr(running, "LOG", tmp_path / "runs" / "log.txt")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "COSTS", tmp_path / "results" / "costs.json")
    monkeypatch.setattr(running, "_POLL", 0.01)
    (tmp_path / "results").mkdir()
    return tmp_path


def script(bench: Path, name: str, body: str, **settings: Any) -> Experiment:
    """An experiment that runs some Python, which finds the place of its output in `out`."""
    head = "import json, sys, pathlib, time, os\nout = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
    (bench / f"{name}.py").write_text(head + body)
    read = settings.pop("read", lambda file: json.loads(Path(file).read_text()))
    return Experiment(name, f"python {name}.py", 1.0, read, **settings)


WRITES = "out.write_text(json.dumps({'figures': {'x': 1.5}}))\n"


def test_what_ran_is_written_and_does_not_run_again(bench: Path) -> None:
    one = script(bench, "one", "assert os.environ['OMP_NUM_THREADS'] == '1'\n" + WRITES)
    said: list[str] = []
    assert not one.up_to_date()
    assert running.run([one], 1, "cpu", said.append) == []
    assert one.up_to_date()
    written = json.loads(one.result.read_text())
    head = {"experiment": "one", "command": "python one.py", "device": "cpu", "key": one.key()}
    assert written == {**head, "figures": {"x": 1.5}}
    assert "one begins" in said[0]
    assert "one is written: results/one.json" in said[1]
    assert experiments.costs()["one"]["runs"] == 1
    assert not replace(one, version=2).up_to_date()


def test_what_fails_is_said_and_the_others_run(bench: Path) -> None:
    bad = script(bench, "bad", "print('first'); sys.exit('no such thing')")
    good = script(bench, "good", WRITES)
    said: list[str] = []
    assert running.run([bad, good], 1, "cpu", said.append) == ["bad"]
    assert any("bad failed" in line and "no such thing (see runs/bad.log)" in line for line in said)
    assert good.up_to_date()
    assert bad.stored() is None


def test_what_cannot_begin_be_read_or_is_killed_is_said_and_the_others_run(bench: Path) -> None:
    class Unknown(Experiment):
        def key(self, device: str = "cpu") -> str:
            raise InputError("no such recipe")

    others = [
        Unknown("unknown", "python unknown.py", 1.0, lambda file: {}),
        script(bench, "silent", "pass"),
        script(bench, "killed", "os.kill(os.getpid(), 9)"),
        script(bench, "good", WRITES),
    ]
    said: list[str] = []
    assert sorted(running.run(others, 2, "cpu", said.append)) == ["killed", "silent", "unknown"]
    text = "\n".join(said)
    assert "unknown failed: no such recipe" in text
    assert "its output cannot be read: FileNotFoundError" in text
    assert "killed by signal 9 (see runs/killed.log)" in text
    assert others[3].up_to_date()


def test_a_recipe_that_changes_meanwhile_leaves_the_result_out_of_date(bench: Path) -> None:
    changing = script(bench, "changing", "pathlib.Path('changed').touch()\n" + WRITES)

    class Changing(Experiment):
        def key(self, device: str = "cpu") -> str:
            return "after" if (bench / "changed").exists() else "before"

    one = Changing(changing.name, changing.command, 1.0, changing.read)
    assert running.run([one], 1, "cpu", lambda _: None) == []
    assert json.loads(one.result.read_text())["key"] == "before"
    assert not one.up_to_date()


def test_experiments_compute_in_float32_where_they_are_told_or_must(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERFOLD_DTYPE", "float16")
    monkeypatch.setenv("LAYERFOLD_OFFLOAD", "always")
    tells = "seen = {k: v for k, v in os.environ.items() if k.startswith('LAYERFOLD_')}\n"
    tells += "out.write_text(json.dumps({'seen': seen}))\n"
    told, own = script(bench, "told", tells), script(bench, "own", tells, device="cpu")
    running.run([told, own], 1, "cuda:1", lambda _: None)
    found = [json.loads(each.result.read_text()) for each in (told, own)]
    assert [each["seen"] for each in found] == [
        {"LAYERFOLD_DEVICE": device, "LAYERFOLD_DTYPE": "float32"} for device in ("cuda:1", "cpu")
    ]
    assert [each["device"] for each in found] == ["cuda:1", "cpu"]
    assert found[0]["key"] != told.key()
    assert told.up_to_date(), "on the device that it was made on"


def test_timed_experiments_run_alone_and_after_the_others(bench: Path) -> None:
    busy = "seen = [each.name for each in pathlib.Path('.').glob('*.busy')]\n"
    body = busy + "own = pathlib.Path(sys.argv[0] + '.busy'); own.touch(); time.sleep(0.3); own.unlink()\n"
    body += "out.write_text(json.dumps({'seen': seen}))\n"
    timed = script(bench, "timed", body, timed=True)
    others = [script(bench, name, body) for name in ("a", "b")]
    said: list[str] = []
    assert running.run([timed, *others], 2, "cpu", said.append) == []
    assert [line.split()[0] for line in said if "begins" in line] == ["a", "b", "timed"]
    assert json.loads(timed.result.read_text())["seen"] == []


def test_two_runs_do_not_go_on_at_once_though_the_first_was_killed(bench: Path) -> None:
    slow = script(bench, "slow", "pathlib.Path('began').touch(); time.sleep(20)\n" + WRITES)
    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\n"
        "from figures import running, experiments\n"
        "at = Path(sys.argv[2])\n"
        "running.ROOT, running.RUNS, experiments.RESULTS = at, at / 'runs', at / 'results'\n"
        "running.COSTS = at / 'results' / 'costs.json'\n"
        "slow = experiments.Experiment('slow', 'python slow.py', 1.0, lambda file: {})\n"
        "running.run([slow], 1, 'cpu', print)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", program, str(ROOT), str(bench)], cwd=bench)
    try:
        for _ in range(600):
            if (bench / "began").exists():
                break
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.wait()
        with pytest.raises(InputError, match="figures are being made already"):
            running.run([slow], 1, "cpu", print)
        assert slow.stored() is None
    finally:
        subprocess.run(["pkill", "-f", str(bench / "runs" / "slow-")], check=False)


def test_a_run_that_went_on_says_in_how_many_runs(bench: Path) -> None:
    again = script(bench, "again", "first = not out.exists(); out.touch()\nif first: os._exit(3)\n" + WRITES)
    assert running.run([again], 1, "cpu", lambda _: None) == ["again"]
    assert running.run([again], 1, "cpu", lambda _: None) == []
    assert experiments.costs()["again"]["runs"] == 2


def test_a_file_that_is_needed_and_not_named_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("SMOLLM2", raising=False)
    monkeypatch.setattr(Experiment, "up_to_date", lambda self: False)
    monkeypatch.setattr(running, "run", lambda todo, *_: [])
    monkeypatch.setattr(sys, "argv", ["figures", "run", "quality-smollm2", "gpu"])
    assert command.main() == 0
    out = capsys.readouterr().out
    assert (
        "quality-smollm2 is left out: it needs SmolLM2-135M-Instruct.Q4_1.gguf; name it in the variable SMOLLM2" in out
    )
    assert "gpu is left out: it needs --device cuda" in out


def test_a_file_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("SMOLLM2", str(tmp_path / "small.gguf"))
    assert "has other contents" in running.missing(EXPERIMENTS["quality-smollm2"])
    assert running.missing(EXPERIMENTS["merge"]) == ""


def test_a_run_in_the_background_is_refused_at_once_where_another_goes_on(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Experiment, "up_to_date", lambda self: False)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("began"))
    monkeypatch.setattr(sys, "argv", ["figures", "run", "merge", "--background"])
    with running.alone():
        assert command.main() == 2
    assert "figures are being made already" in capsys.readouterr().err


def test_what_is_up_to_date_runs_again_where_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Experiment, "up_to_date", lambda self: True)
    ran: list[Any] = []
    monkeypatch.setattr(running, "run", lambda todo, *_: ran.append([each.name for each in todo]) or [])
    for words in (["run", "merge"], ["run", "merge", "--again"]):
        monkeypatch.setattr(sys, "argv", ["figures", *words])
        assert command.main() == 0
    assert ran == [[], ["merge"]]


def test_the_command_line_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLLM2", "/models/small.gguf")
    chosen = [EXPERIMENTS[name] for name in ("merge", "quality-smollm2")]
    places = [running.output(each, "0123456789abcdef") for each in chosen]
    study, benchmark = map(running.command, chosen, places)
    assert study[1:5] == ["-m", "layerfold.cli", "study", "recipes/merge.yaml"]
    assert study[-2:] == ["--output-dir", str(running.RUNS / "merge")]
    assert benchmark[benchmark.index("--model") + 1] == "/models/small.gguf"
    written = running.RUNS / "quality-smollm2-01234567"
    assert benchmark[-4:] == ["--folder", str(written), "--json", f"{written}.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "merg"], "unknown experiment 'merg'; did you mean 'merge'?"),
        (["run", "merge", "--jobs", "0"], "jobs 0; accepted: 1 or more"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", *words])
    assert command.main() == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]


# Pages


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(blocks.BLOCKS, "one", blocks.Block((), lambda: "| a |"))
    return "# Title\n\n<!-- figures: one -->\nold\n<!-- end of figures -->\n\ntext\n"


def test_a_block_is_filled_and_the_rest_stays(page: str) -> None:
    new = pages.filled(page)
    assert new.startswith("# Title\n\n<!-- figures: one -->\n| a |\n")
    assert new.endswith("<!-- end of figures -->\n\ntext\n")
    assert pages.filled(new) == new
    with pytest.raises(InputError, match="unknown block 'on'; did you mean 'one'"):
        pages.filled(page.replace("figures: one", "figures: on"))


def test_a_block_without_its_end_is_refused_and_nothing_is_lost(page: str) -> None:
    for broken in (page.replace("<!-- end of figures -->\n", "") + page, page + "<!-- figures: one -->\ntext\n"):
        with pytest.raises(InputError, match="a block without its end"):
            pages.filled(broken)


def test_a_block_without_its_result_says_which_command_makes_it(bench: Path) -> None:
    block = blocks.Block(("merge",), lambda found: "never")
    assert block.text() == "*Not measured yet with this version: `python -m figures run merge`.*"


def test_a_block_of_an_older_result_says_so(bench: Path) -> None:
    document = {"experiment": "merge", "device": "cpu", "key": "older", "rows": {}}
    EXPERIMENTS["merge"].result.write_text(json.dumps(document))
    block = blocks.Block(("merge",), lambda found: "table")
    assert block.text().startswith("table\n\nMade by `layerfold study recipes/merge.yaml`. Made by an earlier version:")
    EXPERIMENTS["merge"].result.write_text(json.dumps(document | {"key": EXPERIMENTS["merge"].key()}))
    assert block.text() == "table\n\nMade by `layerfold study recipes/merge.yaml`."
    on_gpu = document | {"device": "cuda", "key": EXPERIMENTS["merge"].key("cuda")}
    EXPERIMENTS["merge"].result.write_text(json.dumps(on_gpu))
    assert block.text() == "table\n\nMade by `layerfold study recipes/merge.yaml` on cuda."


def test_a_block_of_an_older_result_with_other_rows_shows_none(bench: Path) -> None:
    document = {"experiment": "merge", "device": "cpu", "key": "older", "rows": {}}
    EXPERIMENTS["merge"].result.write_text(json.dumps(document))
    block = blocks.Block(("merge",), lambda found: found["rows"]["gone"])
    assert block.text().startswith("Made by `layerfold study recipes/merge.yaml`. Made by an earlier version:")
    current = document | {"key": EXPERIMENTS["merge"].key()}
    EXPERIMENTS["merge"].result.write_text(json.dumps(current))
    with pytest.raises(KeyError):
        block.text()


def test_a_recipe_that_names_other_blocks_than_the_search_found_is_said() -> None:
    chosen = cells.chosen_blocks("repair")
    assert chosen["drop_6"] == [1, 3, 5, 7, 9, 11]
    assert blocks.methods._disagreement("repair", chosen, {"drop_6": [1, 3, 5, 7, 9, 11]}) == ""
    said = blocks.methods._disagreement("repair", chosen, {"drop_6": [0, 1]})
    assert '"drop_6" has blocks 1 3 5 7 9 11 in `recipes/repair.yaml`; the search found 0 1.**' in said
    assert cells.chosen_blocks("share")["five blocks share, rank 30"] == [1, 2, 3, 4, 5]


def test_text_of_a_model_is_no_markup() -> None:
    assert cells.plain("a|b <i> *c* _d_ `e` \\|\n[f]") == r"a\|b &lt;i&gt; \*c\* \_d\_ \`e\` \\\| \[f\]"


@pytest.mark.parametrize(
    ("row", "name", "said"),
    [
        (
            {"perplexity": 53.04, "perplexity_low": 47.68, "perplexity_high": 58.99},
            "perplexity",
            "53.04 [47.68, 58.99]",
        ),
        ({"parameters": 6960768.0}, "parameters", "6.96M"),
        ({"imdb_accuracy": 0.82, "imdb_accuracy_deviation": 0.01}, "imdb_accuracy", "82.0% ± 1.0%"),
        ({}, "perplexity", ""),
    ],
)
def test_a_figure_in_a_cell(row: dict[str, float], name: str, said: str) -> None:
    assert cells.figure(row, name) == said


def test_a_changed_result_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = tmp_path / "README.md"
    monkeypatch.setitem(blocks.BLOCKS, "one", blocks.Block((), lambda: "new"))
    written.write_text("<!-- figures: one -->\nold\n<!-- end of figures -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "pages", lambda: [written])
    assert [*pages.stale()] == ["README.md"]
    written.write_text(pages.filled(written.read_text()))
    assert [*pages.stale()] == []


def test_methods_by_sizes_with_the_lowest_in_bold_and_what_cannot_be_told_apart() -> None:
    def row(method: str, value: float, over_plan: float | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"value": value, "low": value, "high": value, "over base": [value / 50] * 3}
        if over_plan is not None:
            found["over plan"] = [over_plan, over_plan - 0.01, over_plan + 0.01]
        return {"method": method, "kept": 6, "parameters": 4_000_000, "nonzero": 4_000_000, "perplexity": found}

    names = {"layerfold": "layerfold's plan", "bi": "ShortGPT", "sleb": "SLEB", "magnitude": "magnitude"}
    found = {
        "methods": {name: {"title": said, "zeros": name == "magnitude"} for name, said in names.items()},
        "sizes": {"6": 4_291_584},
        "rows": [
            {"method": "base", "kept": 12, "parameters": 7_000_000, "perplexity": {"value": 50, "low": 48, "high": 52}},
            row("layerfold", 60),
            row("bi", 90, 1.5),
            row("sleb", 60.3, 1.005),
            row("magnitude", 55, 0.92),
        ],
    }
    lines = blocks.plans._by_size(found, "perplexity").splitlines()
    assert lines[2] == "| parameters, millions | 4.29 |"
    assert lines[3] == "| layerfold's plan | **60.0** |"
    assert "| × base | 1.20 |" in lines
    assert "| magnitude (zeros) | **55.0** |" in lines
    assert lines[-1] == (
        "Base: 50.00 [48.00, 52.00]. Not above the plan by more than the paired 95 % interval: SLEB at 6."
    )


def test_trials_that_remove_as_much_in_two_ways_are_two_rows() -> None:
    prune = {"sparsity": 0.4, "structure": "neurons+heads"}
    same = {"said": "prune 40% of neurons and heads, repaired", "repair": "refit", "whole": False}
    trials = [
        {**same, "row": {"prune": prune}, "parameters": 4_600_000, "perplexity": 80.0},
        {**same, "row": {"prune": {**prune, "uniform": True}}, "parameters": 4_300_000, "perplexity": 107.0},
    ]
    rows = plans._plan_trials({"trials": trials}).splitlines()[2:]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        ["prune 40% of neurons and heads", "4.60M", "", "80.00"],
        ["prune 40% of neurons and heads, uniform", "4.30M", "", "107.0"],
    ]
