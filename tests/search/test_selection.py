from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import t
from tables import TableOfScores, flat, selection

from layerfold.search.scores import PIECES, Removed
from layerfold.search.selection import behind

PAIRS: list[Removed] = list(combinations(range(6), 2))


def by_sum(removed: Removed) -> float:
    return 3 + 0.1 * sum(removed)


def test_without_a_race_all_are_measured_on_all_of_the_text() -> None:
    scores = flat(by_sum)
    select = selection(scores, race=False)
    best = select({1: [(2,), (0,), (1,)], 2: PAIRS}, 2)
    assert best == {1: [(0,), (1,)], 2: [(0, 1), (0, 2)]}
    assert scores.asked == [(removed, 16) for removed in [(2,), (0,), (1,), *PAIRS]]
    assert select.finished == [(2,), (0,), (1,), *PAIRS]
    assert (select.given_up, select.scored, select.all_windows) == (0, 18 * 16, 18 * 16)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [1, 3])
def test_a_race_finds_the_same_leaders_with_less_work(seed: int, keep: int) -> None:
    scores = flat(by_sum, noise=0.3)
    select = selection(scores, race=True, seed=seed)
    groups = {1: [(i,) for i in range(6)], 2: PAIRS}
    assert select(groups, keep) == selection(flat(by_sum, noise=0.3), race=False)(groups, keep)
    assert select.given_up > 0
    assert select.given_up + len(select.finished) == 21
    assert select.scored < 0.8 * select.all_windows == 0.8 * 21 * 16
    assert [windows for _, windows in scores.asked] == sorted(windows for _, windows in scores.asked)


def test_a_race_gives_none_up_that_it_cannot_tell_apart() -> None:
    select = selection(flat(lambda _: 3.0, noise=0.3), race=True)
    select({2: PAIRS}, 1)
    assert select.given_up == 0
    assert select.finished == PAIRS


def test_a_race_reads_windows_in_an_order_of_its_seed() -> None:
    def first_window(seed: int) -> int:
        order: list[int] = []
        scores = flat(by_sum)
        scores.measure = lambda candidates, windows=None, *_, **__: order.append(windows[0])  # type: ignore[assignment, method-assign, index]
        selection(scores, race=True, seed=seed)({2: PAIRS}, 1)
        return order[0]

    assert first_window(3) == first_window(3)
    assert len({first_window(seed) for seed in range(8)}) > 1


@pytest.mark.parametrize("race", [False, True])
def test_what_is_not_a_number_comes_last_and_of_equals_the_first(race: bool) -> None:
    figures = {(0,): math.nan, (1,): 4.0, (2,): 4.0, (3,): math.inf}
    scores = TableOfScores(lambda removed: np.full((16, PIECES), figures[removed]))
    with np.errstate(invalid="ignore"):
        best = selection(scores, race=race)({1: list(figures)}, 4)
    assert best[1][:2] == [(1,), (2,)]
    assert race or best[1] == [(1,), (2,), (3,), (0,)]


def test_one_window_is_all_of_the_text() -> None:
    scores = flat(by_sum, windows=1)
    select = selection(scores, race=True)
    assert select({2: PAIRS}, 1) == {2: [(0, 1)]}
    assert select.given_up == 0


class TestBehind:
    """`behind` on a table small enough to do by hand."""

    tokens = np.ones((4, 2))

    def test_by_more_than_chance_in_the_paired_differences(self) -> None:
        # Two of four windows read: the differences to the first are d = 1 + e and have a deviation of s; the standard
        # error of their sum of four is s sqrt(4) sqrt(1 - 4 / 8).
        scatter = np.array([[0.1, -0.1], [0.1, -0.1]])
        deviation = scatter.std(ddof=1)
        first = np.zeros((2, 2))
        limit = t.ppf(0.9995, 3) * deviation * math.sqrt(4) * math.sqrt(1 / 2)
        just_in, just_out = first + scatter + 0.999 * limit / 4, first + scatter + 1.001 * limit / 4
        found = behind(np.stack([first, just_in, just_out]), self.tokens, [0, 1], 1)
        assert found.tolist() == [False, False, True]

    def test_after_all_of_the_text_whoever_is_worse(self) -> None:
        values = np.stack([np.zeros((4, 2)), np.full((4, 2), 1e-9), np.zeros((4, 2))])
        assert behind(values, self.tokens, [0, 1, 2, 3], 1).tolist() == [False, True, False]

    def test_the_last_of_the_leaders_counts(self) -> None:
        values = np.stack([np.full((2, 2), float(i)) for i in range(4)])
        assert behind(values, self.tokens, [0, 1], 2).tolist() == [False, False, True, True]
        assert behind(values, self.tokens, [0, 1], 4).tolist() == [False] * 4
        assert behind(values, self.tokens, [0, 1], 9).tolist() == [False] * 4

    def test_pieces_without_tokens_say_nothing(self) -> None:
        tokens = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
        values = np.zeros((2, 2, 2))
        values[1] = [[1.0, 0.0], [1.0, 1.0]]  # by one at each token: no scatter at all
        assert behind(values, tokens, [0, 1], 1).tolist() == [False, True]
