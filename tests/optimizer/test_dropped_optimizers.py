"""The mean never dies with its optimizer, and a new optimizer never takes a sample for the mean."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.posterior import Posterior

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "seed": 1}


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def values(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def same(net: nn.Module, mean: list[Tensor]) -> bool:
    return all(torch.equal(param, value) for param, value in zip(net.parameters(), mean, strict=True))


def returns(net: nn.Module, backend: str, seen: list[list[Tensor]]) -> None:
    optimizer = IVON(net.parameters(), **OPTIONS, backend=backend)
    for step in range(5):
        optimizer.train()
        if step == 3:
            seen.append([optimizer.mean_of(param).clone() for param in net.parameters()])
            return
        net(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def raises(net: nn.Module, backend: str, seen: list[list[Tensor]]) -> None:
    optimizer = IVON(net.parameters(), **OPTIONS, backend=backend)
    optimizer.train()
    seen.append([optimizer.mean_of(param).clone() for param in net.parameters()])
    raise KeyboardInterrupt


def waits_for_the_collector(net: nn.Module, backend: str, seen: list[list[Tensor]]) -> None:
    optimizer = IVON(net.parameters(), **OPTIONS, backend=backend)
    circle: list[Any] = [optimizer]
    circle.append(circle)
    seen.append(values(net))
    optimizer.train()


def in_sample_in_step(net: nn.Module, backend: str, seen: list[list[Tensor]]) -> None:
    optimizer = IVON(net.parameters(), **OPTIONS, backend=backend, sample_in_step=True)
    optimizer.train()
    net(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
    seen.append([optimizer.mean_of(param).clone() for param in net.parameters()])


def after_a_move(net: nn.Module, backend: str, seen: list[list[Tensor]]) -> None:
    optimizer = IVON(net.parameters(), **OPTIONS, backend=backend)
    seen.append(values(net))
    optimizer.train()
    for param in net.parameters():
        param.data = param.data.clone()  # as .to() and .cuda() do


@pytest.mark.parametrize("how", [returns, raises, waits_for_the_collector, in_sample_in_step, after_a_move])
def test_the_mean_comes_back(how: Callable[..., None], backend: str) -> None:
    net = network()
    seen: list[list[Tensor]] = []
    try:
        how(net, backend, seen)
    except KeyboardInterrupt:
        sys.last_value = None  # as in a notebook, whose traceback keeps the frame
    gc.collect()
    assert same(net, seen[0])
    again = IVON(net.parameters(), **OPTIONS, backend=backend)
    again.train()
    again.eval()
    assert same(net, seen[0])


def test_a_cell_run_again_takes_the_mean_and_not_the_sample() -> None:
    net = network()
    mean = values(net)
    optimizer = IVON(net.parameters(), **OPTIONS)
    optimizer.train()
    optimizer = IVON(net.parameters(), **OPTIONS)  # the first one is alive until the second is built
    assert same(net, mean) and torch.equal(optimizer.state[net.weight]["mean"], net.weight)
    optimizer.train()
    assert not same(net, mean)
    optimizer.eval()
    assert same(net, mean)


def test_the_holder_goes_on_where_another_took_the_mean() -> None:
    net = network()
    mean = values(net)
    first = IVON(net.parameters(), **OPTIONS)
    first.train()
    sample = values(net)
    IVON(net.parameters(), **OPTIONS)
    assert not first.holds_sample and same(net, mean)
    first.train()
    assert same(net, sample)


@pytest.mark.parametrize("call", ["train", "state_dict", "posterior"])
def test_an_optimizer_beside_one_that_holds_a_sample_refuses(call: str) -> None:
    net = network()
    first, second = IVON(net.parameters(), **OPTIONS), IVON(net.parameters(), **OPTIONS)
    mean = values(net)
    first.train()
    with pytest.raises(RuntimeError, match="hold a sample of another IVON optimizer"):
        getattr(second, call)(*[net] * (call == "posterior"))
    first.eval()
    assert same(net, mean)
    getattr(second, call)(*[net] * (call == "posterior"))


def test_a_parameter_thawed_later_is_taken_back_too() -> None:
    net = network()
    bias = net.bias.detach().clone()
    net.bias.requires_grad_(False)
    late = IVON(net.parameters(), **OPTIONS)
    net.bias.requires_grad_(True)
    holder = IVON([net.bias], **OPTIONS)
    holder.train()
    late.train()  # gives `bias` its state now
    assert torch.equal(late.state[net.bias]["mean"], bias)
    late.eval()
    assert torch.equal(net.bias, bias)


def test_memory_counts_and_not_the_parameter_object() -> None:
    vectors = torch.randn(4, 3)
    one, two = (nn.Embedding.from_pretrained(vectors, freeze=False) for _ in range(2))
    mean = vectors.clone()
    first = IVON(one.parameters(), **OPTIONS)
    first.train()
    second = IVON(two.parameters(), **OPTIONS)
    assert torch.equal(second.state[two.weight]["mean"], mean) and torch.equal(vectors, mean)


def test_a_posteriors_block_is_not_taken_over() -> None:
    net = network()
    posterior: Posterior = IVON(net.parameters(), **OPTIONS).posterior(net)
    with posterior.sampled(net, 0), pytest.raises(RuntimeError, match=r"posterior\.sampled"):
        IVON(net.parameters(), **OPTIONS)


def test_nothing_keeps_a_dropped_optimizers_state() -> None:
    net = network()
    optimizer = IVON(net.parameters(), **OPTIONS)
    optimizer.train()
    state = weakref.ref(optimizer.state)
    del optimizer
    assert state() is None  # at once, without a collection
