"""A classifier made of a decoder: what of a text it reads, and that it trains whatever a decoder has become."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXT, VOCABULARY, halve_, shared, tiny, tiny_model, tokenizer, unequal
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from layerfold.checkpoint.model import Model
from layerfold.errors import TrainingError
from layerfold.evaluators.classification.classifier import (
    Classifier,
    Padding,
    Training,
    fit_head,
    pooled_states,
    predict,
    train,
)
from layerfold.methods import Merge
from layerfold.model import deltas, masks
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT

END = tokenizer().eos_token_id
SHORT = Training(learning_rate=3e-3, epochs=2, batch_size=4, seed=0)
MODELS = pytest.mark.parametrize("architecture", ["gpt2", "llama"])
PADDINGS = [Padding(side, length) for side in ("left", "right") for length in (None, CONTEXT)]


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


# One token, the longest there may be, and real tokens that are what others pad with, first, last and alone.
ROWS = [*drawn(1, 2, 7, 20, CONTEXT), [0], [END], [5, 0], [5, END], [0, 0, 9], [END, 9, END, END], [7, 0, END, 0]]


def told_by_the_last(count: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Rows of all lengths, and labels that only their last token tells."""
    rng = np.random.default_rng(seed)
    labels = [number % 2 for number in range(count)]
    rows = [[*rng.integers(20, 200, size=rng.integers(0, CONTEXT - 1)).tolist(), (3, 11)[label]] for label in labels]
    return rows, labels


@torch.no_grad()
def alone(decoder: Decoder, row: list[int]) -> Tensor:
    """The hidden state after the norm of a text's last token, by a plain forward pass without any padding."""
    states: Tensor = decoder.model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
    return states[0, -1]


def test_rows_are_padded_on_the_side_and_to_the_length_asked_for() -> None:
    def padded(padding: Padding, *rows: list[int]) -> list[Any]:
        return [each.tolist() for each in padding(rows).values()]

    ids, real = [[9, 9, 1], [2, 3, 9]], [[0, 0, 1], [1, 1, 1]]
    assert padded(Padding("left", token=9), [1], [2, 3, 9]) == [ids, real, [2, 2]]
    ids, real = [[1, 0, 0, 0], [2, 3, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert padded(Padding("right", length=4), [1], [2, 3, 0]) == [ids, real, [0, 2]]
    ids, real = [[1, 9, 9, 9], [2, 3, 0, 4]], [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert padded(Padding("right", 4, pooled=True, token=9), [1], [2, 3, 0, 4]) == [ids, real, [3, 3]]


@pytest.mark.parametrize("token", [0, END])
@pytest.mark.parametrize("padding", PADDINGS)
def test_what_is_read_is_the_last_real_token_whatever_is_beside_it(family: str, padding: Padding, token: int) -> None:
    model = tiny(family)
    expected = torch.stack([alone(model.decoder, row) for row in ROWS])
    padding = Padding(padding.side, padding.length, token=token)
    for batch_size in (1, 3, len(ROWS)):
        found = pooled_states(Classifier(model.decoder, 2), ROWS, padding, batch_size, SILENT, "")
        assert torch.from_numpy(found).float().sub(expected).abs().max() < 1e-4


@MODELS
@torch.no_grad()
def test_the_last_position_is_padding_where_a_text_is_short_and_a_neighbour_that_is_all_padding_changes_nothing(
    architecture: str,
) -> None:
    model = tiny(architecture)
    classifier = Classifier(model.decoder, 2).eval()
    rows = drawn(4, CONTEXT, CONTEXT - 1)
    padding = Padding("right", CONTEXT, pooled=True, token=END)
    found = torch.from_numpy(pooled_states(classifier, rows, padding, 3, SILENT, "")).float()
    for row, state in zip(rows, found, strict=True):
        missing = CONTEXT - len(row)
        ids, real = torch.tensor([row + [END] * missing]), torch.tensor([[1] * len(row) + [0] * missing])
        expected = model.decoder.model.base_model(input_ids=ids, attention_mask=real).last_hidden_state[0, -1]
        assert state.sub(expected).abs().max() < 1e-4
        assert (state.sub(alone(model.decoder, row)).abs().max() > 0.01) == (missing > 0)
    nothing = {name: torch.cat([each, torch.zeros_like(each[:1])]) for name, each in Padding("left")(ROWS[:4]).items()}
    for state, row in zip(classifier.pooled(**nothing), ROWS[:4], strict=False):
        assert state.sub(alone(model.decoder, row)).abs().max() < 1e-4


@MODELS
@torch.no_grad()
def test_logits_are_those_of_transformers_own_classifier(architecture: str) -> None:
    base = tiny_model(architecture)
    classifier = Classifier(Decoder(base), 3).eval()
    config = copy.deepcopy(base.config)
    config.num_labels, config.pad_token_id = 3, 0
    reference = AutoModelForSequenceClassification.from_config(config).eval()
    reference.base_model.load_state_dict(base.base_model.state_dict())
    reference.score.weight.copy_(classifier.head.weight)
    if classifier.head.bias is not None:
        classifier.head.bias.zero_()
    rows = [[token or 1 for token in row] for row in drawn(1, 2, 7, 20, CONTEXT)]  # it looks for the padding's id
    right = Padding("right")(rows)
    expected = reference(input_ids=right["input_ids"], attention_mask=right["attention_mask"]).logits
    assert expected.std() > 0.01
    for padding in PADDINGS:
        assert classifier(**padding(rows))["logits"].sub(expected).abs().max() < 1e-5
    labels = torch.tensor([0, 1, 2, 1, 0])
    loss = classifier(**right, labels=labels)["loss"]
    assert loss == pytest.approx(-expected.log_softmax(1)[range(5), labels].mean().item(), abs=1e-5)


def without_parts(model: Model) -> None:
    model.decoder.remove_("attention", [1, 3])
    model.decoder.remove_("ffn", [0, 3])


CHANGES: dict[str, tuple[str, Callable[[Model], Any]]] = {
    "without blocks": ("gpt2", lambda model: model.decoder.keep_([0, 3])),
    "without parts": ("llama", without_parts),
    "tied": ("gpt2", lambda model: Merge(n=2, align="none").apply(model.decoder, None)),
    "with deltas of ranks 0, 1, 2": ("llama", lambda model: unequal(shared(model))),
    "without deltas": ("gpt2", lambda model: shared(model, rank=0)),
    "with zeros, gated": ("llama", lambda model: halve_(model.decoder)),
    "with zeros": ("gpt2", lambda model: halve_(model.decoder)),
}


def state(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in decoder.model.state_dict().items()}


@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize(("architecture", "change"), CHANGES.values(), ids=list(CHANGES))
def test_whatever_a_decoder_has_become_is_classified_with_and_stays_as_it_is(
    architecture: str, change: Callable[[Model], None], body: bool
) -> None:
    model = tiny(architecture)
    change(model)
    decoder = model.decoder
    modules = list(decoder.model.modules())
    for number, module in enumerate(modules):
        module.training = number % 2 == 0
    next(decoder.model.parameters()).requires_grad_(False)
    before, held = state(decoder), masks.held(decoder)
    trained = [parameter.requires_grad for parameter in decoder.model.parameters()]
    rows, labels = told_by_the_last(12)
    if body:
        classifier = train(decoder, rows, labels, 2, SHORT, Padding())
    else:
        classifier = fit_head(decoder, rows, labels, 2, Padding(), 5)
    found = predict(classifier, rows, Padding(), 5)
    assert set(found) <= {0, 1}
    # The decoder is what it was.
    after = state(decoder)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert list(decoder.model.modules()) == modules
    assert [module.training for module in modules] == [number % 2 == 0 for number in range(len(modules))]
    assert [parameter.requires_grad for parameter in decoder.model.parameters()] == trained
    assert all(parameter.grad is None for parameter in decoder.model.parameters())
    assert list(masks.held(decoder)) == list(held)
    # What was tied still is, and zeros that are held are zeros.
    mine, theirs = dict(classifier.body.named_parameters()), dict(decoder.model.base_model.named_parameters())
    assert list(mine) == list(theirs)
    prefix = f"{decoder.model.base_model_prefix}."
    for name, kept in held.items():
        weight = mine[name.removeprefix(prefix)]
        assert not weight.detach()[~kept].any()
        assert weight.detach()[kept].all()
    moved = [name for name, parameter in mine.items() if not torch.equal(parameter, theirs[name])]
    assert len(moved) == (sum(bool(parameter.numel()) for parameter in mine.values()) if body else 0)
    assert len(deltas.factored(decoder)) == sum("Factored" in type(m).__name__ for m in classifier.body.modules())


@pytest.mark.parametrize(
    ("architecture", "body", "dtype"),
    [
        *(("gpt2", body, dtype) for body in (True, False) for dtype in (torch.float32, torch.bfloat16)),
        ("llama", True, torch.float32),
    ],
)
def test_what_the_last_token_tells_is_learnt(architecture: str, body: bool, dtype: torch.dtype) -> None:
    decoder = tiny(architecture).decoder
    decoder.model.to(dtype)
    rows, labels = told_by_the_last(48 if body else 300)
    if body:
        classifier = train(decoder, rows, labels, 2, Training(3e-3, 4, 4, 0), Padding())
    else:
        classifier = fit_head(decoder, rows, labels, 2, Padding(), 32)
    rows, labels = told_by_the_last(200, seed=1)
    # To read any other token is to guess; a head alone, on a body of random weights, does not read it perfectly.
    assert np.mean(np.array(predict(classifier, rows, Padding(), 32)) == labels) > (0.9 if body else 0.75)


@MODELS
def test_neither_side_nor_batch_changes_a_prediction(architecture: str) -> None:
    rows, labels = drawn(*range(1, CONTEXT, 2), seed=1), [number % 3 for number in range(CONTEXT // 2)]
    decoder = tiny(architecture).decoder
    for classifier in (
        train(decoder, rows, labels, 3, SHORT, Padding()),
        fit_head(decoder, rows, labels, 3, Padding(), 8),
    ):
        more = [*ROWS, *drawn(*range(1, CONTEXT, 3), seed=2)]
        expected = [int(classifier.eval()(**Padding()([row]))["logits"].argmax()) for row in more]
        assert len(set(expected)) > 1
        for padding in PADDINGS:
            for batch_size in (4, 100):
                assert predict(classifier, more, padding, batch_size) == expected


def test_a_fitted_head_is_the_same_however_its_rows_were_read_and_uses_up_no_random_numbers() -> None:
    rows, labels = drawn(*range(1, CONTEXT), seed=1), [number % 3 for number in range(CONTEXT - 1)]
    decoder, before = tiny("gpt2").decoder, torch.get_rng_state()
    fitted, again = (fit_head(decoder, rows, labels, 3, Padding(), 8).head for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(fitted.weight, again.weight)
    assert torch.equal(fitted.bias, again.bias)
    classifier = fit_head(decoder, rows, labels, 3, Padding(), 8)
    shares = torch.cat([classifier(**Padding()([row]))["logits"].softmax(1) for row in rows]).sum(0).tolist()
    assert shares == pytest.approx([labels.count(label) for label in range(3)], abs=0.01)  # so a free bias has it
    for padding in PADDINGS:
        found = fit_head(decoder, rows, labels, 3, padding, 3).head.weight
        assert found.sub(fitted.weight).abs().max() < 0.01 * fitted.weight.abs().max()


def test_a_seed_is_one_classifier_and_orders_the_rows_anew_each_epoch() -> None:
    decoder = tiny("gpt2").decoder
    rows, labels = told_by_the_last(12)

    def trained(seed: int) -> tuple[Classifier, list[int]]:
        read: list[int] = []

        def padding(batch: list[list[int]]) -> dict[str, Tensor]:
            read.extend(rows.index(row) for row in batch)
            return Padding()(batch)

        return train(decoder, rows, labels, 2, Training(3e-3, 2, 4, seed), padding), read  # type: ignore[arg-type]

    one, first = trained(0)
    torch.manual_seed(2)  # whatever the caller's generators stand at
    (two, second), (other, third) = trained(0), trained(1)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(first, second) for first, second, _ in pairs)
    assert not any(torch.equal(first, third) for first, _, third in pairs)
    assert sorted(first[:12]) == sorted(first[12:]) == list(range(12))
    assert first[:12] != first[12:]
    assert first == second != third


def test_training_that_diverges_is_said() -> None:
    with pytest.raises(TrainingError, match=r"classification diverged: the loss is nan at step \d+"):
        train(tiny("gpt2").decoder, *told_by_the_last(12), 2, Training(1e30, 4, 2, 0), Padding())


def test_predicting_is_by_rows_in_the_order_given() -> None:
    classifier = Classifier(decoder := tiny("gpt2").decoder, 2)
    with torch.no_grad():
        for parameter in classifier.head.parameters():
            parameter.zero_()
        classifier.head.weight[1] = alone(decoder, ROWS[3]) - alone(decoder, ROWS[4])
    scores = torch.stack([alone(decoder, row) for row in ROWS]) @ classifier.head.weight[1]
    assert predict(classifier, ROWS, Padding(), 2) == (scores > 0).long().tolist()
    assert predict(classifier, ROWS[::-1], Padding(), 2) == (scores > 0).long().tolist()[::-1]
