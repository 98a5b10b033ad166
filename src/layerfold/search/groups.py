"""The search for the groups of blocks whose FFNs cost least to average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layerfold.calibration import Calibration
from layerfold.inference.spool import Apart
from layerfold.inference.stepping import Stepper
from layerfold.maths.intervals import exponential
from layerfold.methods.average import GroupAverage, spelled
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder
from layerfold.progress import Progress
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection
from layerfold.search.stages import Averaged, Blocks, Fetched, Room
from layerfold.text.windows import TokenWindows

Choose = Callable[[Sequence[Blocks]], Blocks]
"""Returns the best of some candidates."""

MOST_ROUNDS = 20
"""Largest number of rounds in which everything that differs in one join is tried."""


def best_groups(
    method: GroupAverage, decoder: Decoder, calibration: Calibration | None, text: TokenWindows, progress: Progress
) -> tuple[GroupAverage, Notes]:
    """Return the method with the best groups, and the perplexity of these and of the published ones.

    A grouping is given by the blocks that join the one before them, as many as join in the published grouping of
    `method.size`. Candidates race (see `Selection`), averaged but not repaired. The result is no worse on the text than
    the published grouping, which is a candidate wherever its FFNs have averages.

    Args:
        decoder: never edited. Averaged FFNs wait in temporary files; one at a time is in memory.
        calibration: of the decoder; None where neurons are not reordered.
        text: the selection text.

    Raises:
        InputError: a group size that the decoder does not admit.
    """
    joins = method.joinable(decoder)
    published = tuple(index for index in range(decoder.n_blocks) if index % method.size)
    stages = Averaged(decoder, method.anchor_of if method.removes_blocks else None)
    scores = Scores(stages, text, divergence=False)
    race, whole = (Selection(scores, "perplexity", race=race, seed=0, progress=progress) for race in (True, False))
    seen: set[Blocks] = set()
    room = Room()

    def averaged(group: range) -> Stepper:
        other, anchor = decoder.copy(share=True), method.anchor_of(group)
        for index in method.written(group):
            other.blocks[index].ffn.own_()
        replace(method, n=None, groups=spelled([group])).average_(other, calibration)
        for index in () if method.removes_blocks else group:
            other.blocks[index].ffn.tie_(other.blocks[anchor].ffn)
        return Fetched(Apart(other, decoder), room)

    def choose(candidates: Sequence[Blocks], select: Selection) -> Blocks:
        seen.update(candidates)
        lacking = [joined for joined in candidates if scores.lacks(joined)]
        groups = list(dict.fromkeys(group for joined in lacking for group in stages.groups(joined)))
        if calibration is not None and method.needs_calibration:
            calibration.matches(pair for group in groups for pair in method.pairs(group))
        stages.held = {group: stages.held.get(group) or averaged(group) for group in groups}
        return select.best(candidates)

    joined = search(lambda some: choose(some, race), lambda some: choose(some, whole), joins, published)
    figures = {
        spelled(stages.groups(each)): exponential(scores.mean(each, "perplexity"))
        for each in (published, joined)
        if each in seen
    }
    found = replace(method, n=None, groups=spelled(stages.groups(joined)))
    return found, {"perplexity": figures, "scored": len(seen)}


def search(race: Choose, whole: Choose, joins: Sequence[int], published: Blocks) -> Blocks:
    """Return the blocks that join the one before them, as many as in the published grouping.

    Greedy first: the join that costs least is added until there are enough. Then local search from the better of that
    and the published grouping: as long as it helps, one join is moved. That shifts a bound between two groups, or
    splits one group and lengthens another.

    Args:
        race: picks the best of many candidates, almost surely.
        whole: picks the better of two by all of the text, so that no step makes the result worse.
        joins: the blocks that may join.
        published: no candidate where it joins others.
    """
    joined: Blocks = ()
    while len(joined) < len(published):
        joined = race([_with(joined, each) for each in joins if each not in joined])
    if set(published) <= set(joins):
        joined = whole([joined, published])
    for _ in range(MOST_ROUNDS):
        free = [each for each in joins if each not in joined]
        moved = [_with([each for each in joined if each != out], into) for out in joined for into in free]
        better = whole([joined, race([joined, *moved])])
        if better == joined:
            break
        joined = better
    return joined


def _with(joined: Sequence[int], index: int) -> Blocks:
    return tuple(sorted((*joined, index)))
