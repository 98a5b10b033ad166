"""What merge and collapse share: which blocks form a group, and which settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BLOCKS, deep, tiny, windows

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Collapse, Merge

METHOD = pytest.mark.parametrize("method", [Merge, Collapse])


@pytest.mark.parametrize(
    ("settings", "n_blocks", "spelled"),
    [
        ({"n": 2}, 12, "0-1,2-3,4-5,6-7,8-9,10-11"),
        ({"n": 5}, 12, "0-4,5-9,10-11"),
        ({"n": 11}, 12, "0-10"),  # a last group of one is no group
        ({"n": 12}, 12, "0-11"),
        ({"groups": "1-4,5-8"}, 12, "1-4,5-8"),
        ({"groups": " 5-8 , 1-2 "}, 12, "1-2,5-8"),
        ({"groups": "0-3"}, 4, "0-3"),
    ],
)
@METHOD
def test_groups_are_spelled_out(method: type[Merge], settings: dict[str, Any], n_blocks: int, spelled: str) -> None:
    resolved = method(**settings).resolved(deep(n_blocks))
    assert resolved["groups"] == spelled
    assert resolved["name"] == method.name


def test_two_spellings_of_the_same_groups_resolve_alike() -> None:
    assert Merge(n=2).resolved(deep(4)) == Merge(groups="0-1,2-3").resolved(deep(4))
    assert Merge(n=2).resolved(deep(4)) != Merge(n=2, tie=True).resolved(deep(4))
    assert Collapse(n=2).resolved(deep(4)) != Collapse(n=2, anchor="last").resolved(deep(4))


@pytest.mark.parametrize(("anchor", "index"), [("first", 3), ("middle", 4), ("last", 6)])
def test_the_anchor_is_named_by_place(anchor: Any, index: int) -> None:
    assert Merge(n=2, anchor=anchor).anchor_of(range(3, 7)) == index


@pytest.mark.parametrize(
    ("settings", "received", "accepted"),
    [
        ({"n": 1}, "n 1", "2"),
        ({"n": 0}, "n 0", "2"),
        ({"n": -3}, "n -3", "2"),
        ({}, "n None and groups None", "one of the two"),
        ({"n": 2, "groups": "0-1"}, "n 2 and groups '0-1'", "one of the two"),
        ({"n": 1, "groups": "auto"}, "n 1", "2"),
        ({"groups": "atuo"}, "'atuo'; did you mean 'auto'?", "auto, or first-last"),
        ({"groups": "AUTO"}, "'AUTO'; did you mean 'auto'?", "auto, or first-last"),
        ({"groups": "auto,1-2"}, "'auto,1-2'", "auto, or first-last"),
        ({"groups": "3-1"}, "'3-1'", "first-last"),
        ({"groups": "2-2"}, "'2-2'", "two or more"),
        ({"groups": "a-b"}, "'a-b'", "first-last"),
        ({"groups": "1"}, "'1'", "first-last"),
        ({"groups": ""}, "''", "first-last"),
        ({"groups": "1-2,"}, "''", "first-last"),
        ({"groups": "1--2"}, "'1--2'", "first-last"),
        ({"groups": "1-3,3-4"}, "'1-3,3-4'", "name block 3 twice"),
        ({"groups": "0-5,1-2"}, "'0-5,1-2'", "name block 1 twice"),
        ({"n": 2, "align": "greedy"}, "align 'greedy'", "hungarian, none"),
        ({"n": 2, "anchor": "second"}, "anchor 'second'", "first, middle, last"),
    ],
)
@METHOD
def test_a_wrong_setting_says_what_was_received_and_what_is_accepted(
    method: type[Merge], settings: dict[str, Any], received: str, accepted: str
) -> None:
    with pytest.raises(InputError) as raised:
        method(**settings)
    assert received in str(raised.value)
    assert accepted in str(raised.value)
    assert "\n" not in str(raised.value)


@METHOD
def test_groups_that_are_to_be_searched_stay_auto_with_their_size(method: type[Merge | Collapse]) -> None:
    assert method(groups="auto").resolved(deep(4)) == method(groups="auto", n=2).resolved(deep(4))
    assert method(groups="auto").resolved(deep(4)) | {"groups": "0-1,2-3"} == method(n=2).resolved(deep(4)) | {"n": 2}
    assert method(groups="auto", n=3).resolved(deep(4)) != method(groups="auto").resolved(deep(4))
    with pytest.raises(InputError, match=r"n 5 for a model of 4 blocks; accepted: 2 \.\.\. 4"):
        method(groups="auto", n=5).resolved(deep(4))
    with pytest.raises(InputError, match="n 2 for a model of 1 block, which has none to be grouped with"):
        method(groups="auto").resolved(deep(1))
    with pytest.raises(InputError, match="groups auto, and nothing has searched for them"):
        method(groups="auto", align="none").apply(deep(4), None)


@pytest.mark.parametrize("settings", [{"n": BLOCKS + 1}, {"groups": "0-9"}, {"groups": f"1-{BLOCKS}"}])
@METHOD
def test_a_setting_beyond_the_depth_is_refused_before_anything_is_edited(
    method: type[Merge], settings: dict[str, Any]
) -> None:
    decoder = tiny("gpt2").decoder
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    for act in (
        lambda: method(**settings).resolved(deep(BLOCKS)),
        lambda: method(**settings, align="none").apply(decoder, None),
    ):
        with pytest.raises(InputError, match=r"for a model of (4 blocks; accepted: 2 \.\.\. 4|blocks 0 \.\.\. 3)"):
            act()
    assert all(tensor.equal(before[name]) for name, tensor in decoder.model.state_dict().items())


@METHOD
def test_a_model_of_one_block_has_no_groups(method: type[Merge]) -> None:
    with pytest.raises(InputError, match="n 2 for a model of 1 block, which has none to be grouped with"):
        method(n=2).resolved(deep(1))


@METHOD
def test_aligning_without_calibration_text_is_refused(method: type[Merge]) -> None:
    assert method(n=2).needs_calibration
    assert not method(n=2, align="none").needs_calibration
    with pytest.raises(InputError, match="needs calibration text"):
        method(n=2).apply(tiny("gpt2").decoder, None)


@pytest.mark.parametrize("align", ["hungarian", "none"])
@METHOD
def test_ffns_of_different_widths_have_no_average(method: type[Merge | Collapse], align: Any) -> None:
    model = tiny("gpt2")
    model.decoder.keep_neurons_({1: torch.arange(7)})
    before = model.sha256
    with pytest.raises(InputError, match="blocks 0 and 1 have 128 and 7 neurons; accepted: as many"):
        method(groups="0-1", align=align).apply(model.decoder, Calibration(model.decoder, windows()))
    assert Model(model.decoder, None, model.provenance).sha256 == before
