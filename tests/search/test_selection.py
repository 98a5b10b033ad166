from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.stats import t
from tables import TableOfScores, flat, selection

from layerfold.errors import InputError
from layerfold.progress import SILENT
from layerfold.search.selection import CHANCE, Selection, Strategy, beam, behind, check_number, exhaustive
from layerfold.search.stages import Blocks

PAIRS: list[Blocks] = list(combinations(range(6), 2))


def by_sum(removed: Blocks) -> float:
    return 3 + 0.1 * sum(removed)


def test_without_a_race_all_are_measured_on_all_of_the_text() -> None:
    scores = flat(by_sum)
    select = selection(scores, race=False)
    best = select({1: [(2,), (0,), (1,)], 2: PAIRS}, 2)
    assert best == {1: [(0,), (1,)], 2: [(0, 1), (0, 2)]}
    assert scores.asked == [(removed, 64) for removed in [(2,), (0,), (1,), *PAIRS]]
    assert select.finished == [(2,), (0,), (1,), *PAIRS]
    assert (select.given_up, select.scored, select.all_windows) == (0, 18 * 64, 18 * 64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [1, 3])
def test_a_race_finds_the_same_leaders_with_less_work(seed: int, keep: int) -> None:
    scores = flat(by_sum, noise=0.3)
    select = selection(scores, race=True, seed=seed)
    groups = {1: [(i,) for i in range(6)], 2: PAIRS}
    assert select(groups, keep) == selection(flat(by_sum, noise=0.3), race=False)(groups, keep)
    assert select.given_up > 0
    assert select.given_up + len(select.finished) == 21
    assert select.scored < 0.8 * select.all_windows == 0.8 * 21 * 64
    assert [windows for _, windows in scores.asked] == sorted(windows for _, windows in scores.asked)


def test_a_race_reads_windows_in_an_order_of_its_seed() -> None:
    def first_window(seed: int) -> int:
        order: list[int] = []
        scores = flat(by_sum)
        scores.measure = lambda candidates, windows=None, *_, **__: order.append(windows[0])  # type: ignore[assignment, method-assign, index]
        selection(scores, race=True, seed=seed)({2: PAIRS}, 1)
        return order[0]

    assert first_window(3) == first_window(3)
    assert len({first_window(seed) for seed in range(8)}) > 1


def test_a_race_gives_none_up_that_it_cannot_tell_apart_and_one_window_is_all_of_the_text() -> None:
    select = selection(flat(lambda _: 3.0, noise=0.3), race=True)
    select({2: PAIRS}, 1)
    assert select.given_up == 0
    assert select.finished == PAIRS
    select = selection(flat(by_sum, windows=1), race=True)
    assert select({2: PAIRS}, 1) == {2: [(0, 1)]}
    assert select.given_up == 0


@pytest.mark.parametrize("race", [False, True])
def test_what_is_not_a_number_comes_last_and_of_equals_the_first(race: bool) -> None:
    figures = {(0,): math.nan, (1,): 4.0, (2,): 4.0, (3,): math.inf}
    scores = TableOfScores(lambda removed: np.full(64, figures[removed]))
    with np.errstate(invalid="ignore"):
        best = selection(scores, race=race)({1: list(figures)}, 4)
    assert best[1][:2] == [(1,), (2,)]
    assert race or best[1] == [(1,), (2,), (3,), (0,)]


@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_the_winner_survives_races_whose_windows_differ_more_than_their_tokens(alike: float) -> None:
    """Two candidates, of which the second is ahead on many windows: what counts is how windows differ."""
    lost = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        scatter = 0.1 * (1 + alike) * generator.standard_normal(32)
        figures = {(0,): np.zeros(32), (1,): 0.02 + scatter - scatter.mean()}
        select = selection(TableOfScores(figures.__getitem__, windows=32), race=True, seed=seed)
        lost += select({1: list(figures)}, 1) != {1: [(0,)]}
    assert lost <= 3


def lost(candidates: int, windows: int, searches: int, chance: float = CHANCE) -> tuple[int, float]:
    """How many races among equals, but for chance, give up the best; and what share of the windows they score."""
    names, losses, scored = [(index,) for index in range(candidates)], 0, 0.0
    for seed in range(searches):
        figures = np.random.default_rng([seed, candidates]).standard_normal((candidates, windows))
        stand_in: Any = TableOfScores(lambda removed, figures=figures: figures[removed[0]], windows=windows)
        select = Selection(stand_in, "perplexity", race=True, seed=seed, progress=SILENT, chance=chance)
        losses += select({1: names}, 1)[1][0] != (int(figures.sum(1).argmin()),)
        scored += select.scored / select.all_windows / searches
    return losses, scored


@pytest.mark.parametrize(("candidates", "searches"), [(2, 400), (12, 300), (66, 100)])
def test_no_more_than_one_race_in_a_hundred_loses_the_best_of_equals(candidates: int, searches: int) -> None:
    losses, scored = lost(candidates, 64, searches)
    assert losses <= searches / 100
    assert 0.9 < scored < 1  # equals cannot be told apart


def test_a_larger_chance_loses_more_and_scores_less() -> None:
    (few, most), (many, least) = lost(2, 64, 400), lost(2, 64, 400, chance=0.5)
    assert few < many <= 0.5 * 400
    assert least < most


def test_the_chance_of_a_loss_is_divided_among_rounds_candidates_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []

    def none(values: np.ndarray, windows: int, keep: int, error: float) -> np.ndarray:
        errors.append(error)
        return np.zeros(len(values), dtype=bool)

    monkeypatch.setattr("layerfold.search.selection.behind", none)
    select = selection(flat(by_sum), race=True)
    for calls in (1, 2, 3):
        errors.clear()
        select({1: [(i,) for i in range(6)], 2: PAIRS}, 1)
        # Of 64 windows 4, 6, 9, 14, 21, 32 and 48 end a round; of 6 and 15 candidates the best meets 5 and 14 others.
        assert errors == pytest.approx([CHANCE / (calls * (calls + 1)) / (7 * (5 + 14))] * 14)


class TestBehind:
    """`behind` on a table small enough to do by hand."""

    def test_by_more_than_chance_in_the_paired_differences(self) -> None:
        # Four of eight windows read: the standard error of the sum of four differences of deviation s is
        # s sqrt(4) sqrt(1 - 4 / 8).
        scatter = np.array([0.1, -0.1, 0.1, -0.1])
        limit = t.ppf(0.999, 3) * scatter.std(ddof=1) * math.sqrt(4) * math.sqrt(1 / 2)
        just_in, just_out = scatter + 0.999 * limit / 4, scatter + 1.001 * limit / 4
        assert behind(np.stack([np.zeros(4), just_in, just_out]), 8, 1, 0.001).tolist() == [False, False, True]

    def test_after_all_of_the_text_whoever_is_worse(self) -> None:
        values = np.stack([np.zeros(4), np.full(4, 1e-9), np.zeros(4)])
        assert behind(values, 4, 1, 0.001).tolist() == [False, True, False]

    def test_the_last_of_the_leaders_counts(self) -> None:
        values = np.stack([np.full(4, float(i)) for i in range(4)])
        assert behind(values, 8, 2, 0.001).tolist() == [False, False, True, True]
        assert behind(values, 8, 4, 0.001).tolist() == [False] * 4
        assert behind(values, 8, 9, 0.001).tolist() == [False] * 4

    def test_a_single_window_says_nothing(self) -> None:
        assert behind(np.array([[0.0], [9.0]]), 8, 1, 0.001).tolist() == [False, False]


def trap(removed: Blocks) -> float:
    """1 and 2 are bad alone and best together; 0 is the best alone."""
    if set(removed) >= {1, 2}:
        return 1.0 + 0.01 * sum(removed)
    return 3.0 + {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.4}[removed[0]] + 0.5 * (len(removed) - 1)


ALONE = [(0,), (1,), (2,), (3,)]


def test_exhaustive_looks_at_every_set_and_greedy_may_miss_what_a_wider_beam_finds() -> None:
    def found(strategy: Any, *settings: Any) -> tuple[dict[int, list[Blocks]], list[Blocks]]:
        scores = flat(trap)
        return strategy(selection(scores, race=False), range(4), *settings), [removed for removed, _ in scores.asked]

    best, asked = found(exhaustive, range(1, 4), 1)
    assert best == {1: [(0,)], 2: [(1, 2)], 3: [(0, 1, 2)]}
    assert len(asked) == 4 + 6 + 4
    best, asked = found(beam, range(1, 4), 1, 1)
    assert best == {1: [(0,)], 2: [(0, 1)], 3: [(0, 1, 2)]}
    assert len(asked) == 4 + 3 + 2
    best, asked = found(beam, range(1, 3), 1, 2)
    assert best[2] == [(1, 2)]
    assert sorted(asked) == sorted([*ALONE, (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)])
    assert found(beam, range(3, 4), 1, 1)[0] == {3: [(0, 1, 2)]}, "sizes before the first are not reported"


def test_only_these_indices_are_removed_and_all_where_less_than_are_asked_for_are() -> None:
    scores = flat(lambda removed: float(sum(removed)))
    assert exhaustive(selection(scores, race=False), (1, 5, 7), range(1, 3), 1) == {1: [(1,)], 2: [(1, 5)]}
    found = beam(selection(scores, race=False), (1, 5, 7), range(1, 4), 1, 4)
    assert found == {1: [(1,)], 2: [(1, 5)], 3: [(1, 5, 7)]}
    assert exhaustive(selection(scores, race=False), range(2), range(1, 3), 9) == {1: [(0,), (1,)], 2: [(0, 1)]}


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_so_many_of_each_number_are_returned_best_first_and_a_beam_is_none_the_wider(width: int, race: bool) -> None:
    scores = flat(lambda removed: 3 + 0.1 * sum(removed))
    every = exhaustive(selection(scores, race=race), range(5), range(1, 3), 3)
    assert every == {1: [(0,), (1,), (2,)], 2: [(0, 1), (0, 2), (0, 3)]}
    scores.asked.clear()
    assert beam(selection(scores, race=race), range(5), range(1, 3), 3, width) == every
    assert len({removed for removed, _ in scores.asked}) == 5 + {1: 4, 2: 7}[width]


@pytest.mark.parametrize(
    ("strategy", "width", "there", "counts", "said"),
    [
        ("exhaustive", 8, 48, range(1, 4), r"'exhaustive' for 18,472 .*accepted: 10,000 at most; take strategy beam"),
        ("exhaustive", 8, 14, range(1, 14), r"'exhaustive' for 16,382 "),
        ("beam", 10**9, 48, range(1, 4), r"'beam' for 18,472 .*; take a smaller width than 1000000000, or"),
        ("beam", 16, 48, range(1, 48), r"'beam' for 18,080 "),
        ("exhaustive", 8, 12, range(13), None),
        ("exhaustive", 8, 48, range(1, 3), None),
        ("greedy", 10**9, 48, range(1, 48), None),
        ("beam", 8, 48, range(1, 48), None),
    ],
)
def test_too_many_candidates_are_refused(
    strategy: Strategy, width: int, there: int, counts: range, said: str | None
) -> None:
    with pytest.raises(InputError, match=said) if said else nullcontext():
        check_number(strategy, width, there, counts)


@pytest.mark.parametrize("width", [1, 3])
def test_a_beam_looks_at_no_more_than_what_is_counted(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = flat(lambda removed: float(sum(removed)))
    beam(selection(scores, race=False), range(7), range(1, 6), 1, width)
    monkeypatch.setattr("layerfold.search.selection.MOST_CANDIDATES", len(scores.asked) - 1)
    with pytest.raises(InputError):
        check_number("beam", width, 7, range(1, 6))
