from __future__ import annotations

import pytest
from tables import flat, selection

from layerfold.errors import InputError
from layerfold.search.selection import Strategy, beam, check_number, exhaustive
from layerfold.search.stages import Blocks


def trap(removed: Blocks) -> float:
    """1 and 2 are bad alone and best together; 0 is the best alone."""
    if set(removed) >= {1, 2}:
        return 1.0 + 0.01 * sum(removed)
    return 3.0 + {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.4}[removed[0]] + 0.5 * (len(removed) - 1)


def test_exhaustive_looks_at_every_set() -> None:
    scores = flat(trap)
    assert exhaustive(selection(scores, race=False), range(4), range(1, 4), 1) == {
        1: [(0,)],
        2: [(1, 2)],
        3: [(0, 1, 2)],
    }
    assert len(scores.asked) == 4 + 6 + 4


def test_greedy_goes_on_from_the_best_and_may_miss() -> None:
    scores = flat(trap)
    assert beam(selection(scores, race=False), range(4), range(1, 4), 1, 1) == {
        1: [(0,)],
        2: [(0, 1)],
        3: [(0, 1, 2)],
    }
    assert len(scores.asked) == 4 + 3 + 2


def test_a_wider_beam_finds_what_a_narrow_one_misses() -> None:
    scores = flat(trap)
    assert beam(selection(scores, race=False), range(4), range(1, 3), 1, 2)[2] == [(1, 2)]
    assert sorted(removed for removed, _ in scores.asked) == sorted(
        [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    )


def test_sizes_before_the_first_are_gone_through_and_not_reported() -> None:
    scores = flat(trap)
    assert beam(selection(scores, race=False), range(4), range(3, 4), 1, 1) == {3: [(0, 1, 2)]}


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_so_many_of_each_number_are_returned_best_first_and_a_beam_is_none_the_wider(width: int, race: bool) -> None:
    scores = flat(lambda removed: 3 + 0.1 * sum(removed))
    every = exhaustive(selection(scores, race=race), range(5), range(1, 3), 3)
    assert every == {1: [(0,), (1,), (2,)], 2: [(0, 1), (0, 2), (0, 3)]}
    scores.asked.clear()
    assert beam(selection(scores, race=race), range(5), range(1, 3), 3, width) == every
    assert len({removed for removed, _ in scores.asked}) == 5 + {1: 4, 2: 7}[width]


def test_of_less_than_are_asked_for_all_are_returned() -> None:
    scores = flat(lambda removed: 3 + 0.1 * sum(removed))
    assert exhaustive(selection(scores, race=False), range(2), range(1, 3), 9) == {1: [(0,), (1,)], 2: [(0, 1)]}


def test_only_these_indices_are_removed() -> None:
    scores = flat(lambda removed: float(sum(removed)))
    assert exhaustive(selection(scores, race=False), (1, 5, 7), range(1, 3), 1) == {1: [(1,)], 2: [(1, 5)]}
    assert beam(selection(scores, race=False), (1, 5, 7), range(1, 4), 1, 4) == {
        1: [(1,)],
        2: [(1, 5)],
        3: [(1, 5, 7)],
    }


@pytest.mark.parametrize(
    ("strategy", "width", "there", "counts", "said"),
    [
        ("exhaustive", 8, 48, range(1, 4), r"'exhaustive' for 18,472 .*accepted: 10,000 at most; take strategy beam"),
        ("exhaustive", 8, 14, range(1, 14), r"'exhaustive' for 16,382 "),
        (
            "beam",
            10**9,
            48,
            range(1, 4),
            r"'beam' for 18,472 .*; take a smaller width than 1000000000, or",
        ),
        ("beam", 16, 48, range(1, 48), r"'beam' for 18,080 "),
    ],
)
def test_too_many_candidates_are_refused(strategy: Strategy, width: int, there: int, counts: range, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_number(strategy, width, there, counts)


@pytest.mark.parametrize(
    ("strategy", "width", "there", "counts"),
    [
        ("exhaustive", 8, 12, range(13)),
        ("exhaustive", 8, 48, range(1, 3)),
        ("greedy", 10**9, 48, range(1, 48)),
        ("beam", 8, 48, range(1, 48)),
    ],
)
def test_what_is_not_too_many(strategy: Strategy, width: int, there: int, counts: range) -> None:
    check_number(strategy, width, there, counts)


@pytest.mark.parametrize("width", [1, 3])
def test_a_beam_looks_at_no_more_than_what_is_counted(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = flat(lambda removed: float(sum(removed)))
    beam(selection(scores, race=False), range(7), range(1, 6), 1, width)
    monkeypatch.setattr("layerfold.search.selection.MOST_CANDIDATES", len(scores.asked) - 1)
    with pytest.raises(InputError):
        check_number("beam", width, 7, range(1, 6))
