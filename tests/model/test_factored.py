from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import assert_equal
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerfold.model.factored import Factored

OUT, IN = 7, 5
RANKS = pytest.mark.parametrize("rank", [0, 1, 3, 5])
STOCK = pytest.mark.parametrize("stock", [nn.Linear, Conv1D])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def factored(rank: int, stock: type[nn.Module] = nn.Linear, bias: bool = True) -> Factored:
    c = drawn(OUT) if bias else None
    return Factored(drawn(OUT, IN), drawn(OUT, rank, seed=1), drawn(rank, IN, seed=2), c, stock)


def dense(module: Factored) -> Tensor:
    return (module.weight + module.a @ module.b).detach()


@RANKS
@pytest.mark.parametrize("bias", [True, False])
def test_what_it_computes_is_w_plus_a_b_times_x_plus_c(rank: int, bias: bool) -> None:
    module, x = factored(rank, bias=bias), drawn(2, 3, IN)
    expected = x.double() @ dense(module).double().T + (0 if module.bias is None else module.bias.double())
    assert module(x).shape == (2, 3, OUT)
    assert (module(x) - expected).abs().max() < 1e-5
    assert module.rank == rank
    assert rank or torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias)), "the weight alone"


@RANKS
@STOCK
def test_multiplied_out_it_is_a_stock_module_that_computes_the_same(rank: int, stock: Any) -> None:
    module, x = factored(rank, stock), drawn(2, 3, IN)
    plain: Any = module.multiplied_out()
    assert type(plain) is stock
    assert (plain(x) - module(x)).abs().max() < 1e-5
    assert plain.weight.shape == ((OUT, IN) if stock is nn.Linear else (IN, OUT))
    assert plain.weight.is_contiguous()
    sizes = (plain.out_features, plain.in_features) if stock is nn.Linear else (plain.nf, plain.nx)
    assert sizes == (OUT, IN)
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert not any(parameter.is_meta for parameter in plain.parameters())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    assert_equal(dict(module.state_dict()), before)


@pytest.mark.parametrize("training", [True, False])
def test_without_bias_there_is_none_before_and_after_and_the_mode_stays(training: bool) -> None:
    module = factored(2, bias=False).train(training)
    assert module.bias is None
    assert set(module.state_dict()) == {"weight", "a", "b"}
    assert module.multiplied_out().bias is None
    assert module.multiplied_out().training == training


def test_its_tensors_are_called_weight_a_b_and_bias() -> None:
    assert {name: tuple(each.shape) for name, each in factored(3).state_dict().items()} == {
        "weight": (OUT, IN),
        "a": (OUT, 3),
        "b": (3, IN),
        "bias": (OUT,),
    }


def test_a_parameter_is_used_as_it_is_so_that_several_share_it() -> None:
    shared = nn.Parameter(drawn(OUT, IN))
    one, two = (Factored(shared, drawn(OUT, 1, seed=s), drawn(1, IN, seed=s), None, nn.Linear) for s in (1, 2))
    assert one.weight is two.weight is shared
    assert len(list(nn.ModuleList([one, two]).parameters())) == 5
    both = copy.deepcopy(nn.ModuleList([one, two]))
    assert both[0].weight is both[1].weight
    assert both[0].weight is not shared


@RANKS
def test_a_copy_computes_the_same_with_parameters_of_its_own(rank: int) -> None:
    module, x = factored(rank), drawn(2, IN)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    assert twin.stock is module.stock
    with torch.no_grad():
        twin.weight.add_(1)
    assert not torch.equal(twin(x), module(x))


@RANKS
def test_the_square_is_the_frobenius_norm_of_the_delta(rank: int) -> None:
    module = factored(rank)
    expected = (module.a @ module.b).double().square().sum()
    assert module.square().item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.square().shape == ()
    (module(drawn(2, IN)).sum() + module.square()).backward()
    assert module.weight.grad is not None


def test_gradients_are_those_of_the_dense_matrix() -> None:
    module, x, target = factored(2), drawn(4, IN), drawn(4, OUT, seed=9)
    (module(x) * target).sum().backward()
    whole = target.T @ x
    for name, expected in (
        ("weight", whole),
        ("a", whole @ module.b.detach().T),
        ("b", module.a.detach().T @ whole),
        ("bias", target.sum(0)),
    ):
        assert (module.get_parameter(name).grad - expected).abs().max() < 1e-4, name


def test_the_squares_gradient_reaches_both_factors_and_nothing_else() -> None:
    module = factored(2)
    module.square().backward()
    a, b = module.a.detach(), module.b.detach()
    assert (module.a.grad - 2 * a @ b @ b.T).abs().max() < 1e-4
    assert (module.b.grad - 2 * a.T @ a @ b).abs().max() < 1e-4
    assert module.weight.grad is None


@STOCK
def test_half_precision_stays_half_precision(stock: Any) -> None:
    module = factored(2, stock).to(torch.bfloat16)
    x = drawn(3, IN).bfloat16()
    assert module(x).dtype == torch.bfloat16
    plain = module.multiplied_out()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    assert torch.allclose(plain(x), module(x), rtol=0.05, atol=0.1)
