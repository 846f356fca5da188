"""Bad use ends in one clear sentence, and leaves the weights with the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ivon_kernels import IVON
from tests.support.helpers import assert_same, bowl, flat, parameters, snapshot, train

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "seed": 3}


def test_two_optimizers_that_sample_one_parameter(backend: str) -> None:
    params = parameters(4, 5)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    other = IVON(params[1:], backend=backend, **OPTIONS)
    optimizer.train()
    weights = flat(params)
    for sample in (lambda: other.train(), lambda: other.sampled_params(train=True).__enter__()):
        with pytest.raises(RuntimeError, match="hold a sample of another IVON optimizer"):
            sample()
    assert torch.equal(flat(params), weights)
    optimizer.discard_samples()  # with its step under way, the other's gradients would not be of its sample
    train(other, params[1:], 1)  # one after the other is fine
    train(optimizer, params, 1)


def test_two_optimizers_with_parameters_of_their_own(backend: str) -> None:
    params = parameters(4, 5)
    optimizers = [IVON([p], backend=backend, **OPTIONS) for p in params]
    for optimizer in optimizers:
        optimizer.train()
    bowl(params, 0).backward()
    for optimizer in optimizers:
        optimizer.step()


def test_an_optimizer_that_was_loaded_under_its_sample_holds_nothing(backend: str) -> None:
    params = parameters(4)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    optimizer.train()
    optimizer.load_state_dict(optimizer.state_dict())
    IVON(params, backend=backend, **OPTIONS).train()


def test_a_dropped_optimizer_holds_nothing(backend: str) -> None:
    params = parameters(4)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    optimizer.train()
    del optimizer
    IVON(params, backend=backend, **OPTIONS).train()


@pytest.mark.parametrize("kind", ["another optimizer", "loaded weights"])
@pytest.mark.parametrize("end", ["step", "eval", "block", "evaluation"])
def test_weights_that_are_written_under_a_sample(backend: str, kind: str, end: str) -> None:
    """What is written into a sample would be lost without a word."""
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), backend=backend, **OPTIONS)
    before = snapshot(optimizer)

    def write() -> None:
        if kind == "loaded weights":
            model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
        else:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.AdamW(model.parameters()).step()

    def run() -> None:
        if end in ("block", "evaluation"):
            with optimizer.sampled_params(train=end == "block"):
                write()
        else:
            optimizer.train()
            model(torch.ones(3)).sum().backward()
            write()
            getattr(optimizer, end)()

    with pytest.raises(RuntimeError, match="the weights were written while they held a sample"):
        run()
    assert not optimizer.holds_sample
    assert_same(before, snapshot(optimizer))


def test_no_gradient_ever(backend: str) -> None:
    """The model trains other parameters: it was sharded, or materialized, after the optimizer was built."""
    params = parameters(4, 5)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    mean = flat(params)
    optimizer.train()
    with pytest.raises(RuntimeError, match="none of the optimizer's 2 parameters has had a gradient: call backward"):
        optimizer.step()
    assert torch.equal(flat(params), mean)
    train(optimizer, params, 1)
    before = snapshot(optimizer)
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
    optimizer.step()  # a batch that is skipped, as every torch optimizer allows
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("moment", ["always", "later"])
def test_a_frozen_model(backend: str, moment: str) -> None:
    params = parameters(4, 5)
    if moment == "always":
        for p in params:
            p.requires_grad_(False)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    if moment == "later":
        train(optimizer, params, 1)
        for p in params:
            p.requires_grad_(False)
    mean = flat(params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="none of the optimizer's 2 parameters requires a gradient: unfreeze"):
            optimizer.train()
    assert torch.equal(flat(params), mean) and not optimizer.holds_sample
    for p in params:
        p.requires_grad_(True)
    train(optimizer, params, 1)


def test_an_optimizer_built_before_the_model_moved_follows_it(backend: str) -> None:
    """What other optimizers refuse, or get wrong without a word, is followed here."""
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), backend=backend, **OPTIONS)
    model.to(torch.bfloat16)
    train(optimizer, list(model.parameters()), 2)
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_an_optimizer_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="on the meta device; materialize the model before building the optimizer"):
        IVON(model.parameters(), **OPTIONS)


@pytest.mark.parametrize("attribute", ["_fsdp_flattened", "ds_id"])
def test_flat_shards_of_others(attribute: str) -> None:
    param = nn.Parameter(torch.zeros(4))
    setattr(param, attribute, True)
    with pytest.raises(ValueError, match=r"FSDP1.*use torch.distributed.fsdp.fully_shard|ZeRO-3.*use fully_shard"):
        IVON([param], **OPTIONS)
