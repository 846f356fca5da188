"""Averages over training steps are of the mean: AveragedModel, update_bn, posteriors around them, Lightning's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ivon_kernels import IVON
from ivon_kernels.integrations.lightning import IVONCallback
from ivon_kernels.integrations.state_dict import save_mean
from tests.support.lightning_models import Regression, data, trainer

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:The '.*_dataloader' does not have many workers"),
]

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(5))


def build(**options: Any) -> tuple[nn.Sequential, IVON]:
    """At a learning rate of 0 the mean never moves, so whatever an average is off by comes from samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = IVON(net.parameters(), lr=0.0, ess=100.0, seed=1, **options)
    save_mean(net, optimizer)
    return net, optimizer


def backward(net: nn.Module) -> None:
    net(X).square().mean().backward()


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["", "sample_in_step"])
AVERAGES = {
    "swa": AveragedModel,
    "ema": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "avg_fn": lambda net: AveragedModel(net, avg_fn=lambda old, new, count: (old + new) / 2),
    "buffers": lambda net: AveragedModel(net, use_buffers=True),
}


@FUSED
@pytest.mark.parametrize("when", ["before the step", "after the step"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_models_average_the_mean(kind: str, when: str, fused: bool) -> None:
    net, optimizer = build(sample_in_step=fused)
    start = [p.detach().clone() for p in net.parameters()]
    average = AVERAGES[kind](net)
    for _ in range(3):
        optimizer.train()
        backward(net)
        held = [p.detach().clone() for p in net.parameters()]
        if when == "before the step":
            average.update_parameters(net)
            assert all(map(torch.equal, net.parameters(), held))  # the sample is back
        optimizer.step()
        optimizer.zero_grad()
        if when == "after the step":
            average.update_parameters(net)
    assert optimizer.holds_sample == fused
    for mean, averaged in zip(start, average.module.parameters(), strict=True):
        torch.testing.assert_close(averaged.detach(), mean, rtol=0, atol=1e-6)


@FUSED
def test_averaging_changes_no_number_of_the_training(fused: bool) -> None:
    def run(averages: bool) -> list[Tensor]:
        net, optimizer = build(sample_in_step=fused)
        optimizer.param_groups[0]["lr"] = 0.1
        average = AveragedModel(net)
        for step in range(4):
            if step == 0 or not fused:
                optimizer.train()
            backward(net)
            if averages:
                average.update_parameters(net)
            backward(net)  # a second micro-batch, under the same sample
            optimizer.step()
            optimizer.zero_grad()
            if averages:
                average.update_parameters(net)
                update_bn([X], copy.deepcopy(net))
        optimizer.eval()
        return [p.detach().clone() for p in net.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


@FUSED
def test_a_posterior_around_an_average_of_the_mean(fused: bool) -> None:
    """As docs/recipe.md does it: the average of the means of the later steps, and sigma as it is."""
    net, optimizer = build(sample_in_step=fused)
    optimizer.param_groups[0]["lr"] = 0.1
    trained = nn.ParameterList(net.parameters())
    average, means = AveragedModel(trained), []
    for step in range(6):
        if step == 0 or not fused:
            optimizer.train()
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            with optimizer.at_mean():
                average.update_parameters(trained)
            means.append([optimizer.mean_of(p).clone() for p in trained])
    optimizer.eval()
    before = optimizer.posterior(net)
    with torch.no_grad():
        for weight, mean in zip(trained, average.module, strict=True):
            weight.copy_(mean)
    posterior = optimizer.posterior(net)
    for (name, param), each in zip(net.named_parameters(), zip(*means, strict=True), strict=True):
        expected = torch.stack(each).mean(0)
        assert not torch.equal(each[-1], expected)  # the mean has moved
        torch.testing.assert_close(posterior[name].mean, expected)
        assert torch.equal(posterior[name].sigma, before[name].sigma)
        assert torch.equal(optimizer.mean_of(param), param)


@FUSED
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "in another module"])
def test_update_bn_runs_at_the_mean(wrapped: bool, fused: bool) -> None:
    net, optimizer = build(sample_in_step=fused)
    optimizer.train()
    backward(net)
    if fused:
        optimizer.step()
    held = [p.detach().clone() for p in net.parameters()]
    assert optimizer.holds_sample
    update_bn([X[:16], X[16:]], nn.Sequential(net) if wrapped else net)
    assert optimizer.holds_sample and all(map(torch.equal, net.parameters(), held))
    seen = net[1].running_mean.clone()
    optimizer.eval()
    update_bn([X[:16], X[16:]], net)
    assert torch.equal(seen, net[1].running_mean)


def test_a_failed_pass_leaves_the_sample_where_it_was() -> None:
    net, optimizer = build()
    optimizer.train()
    held = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"shapes"):
        update_bn([X[:, :3]], net)
    assert torch.equal(net[0].weight, held)


def test_other_passes_in_train_mode_keep_the_sample() -> None:
    net, optimizer = build()
    optimizer.train()
    with torch.no_grad():
        sampled = net(X)
    optimizer.eval()
    with torch.no_grad():
        assert not torch.equal(net(X), sampled)


def test_without_hooks_nothing_is_changed() -> None:
    net, optimizer = build()
    twin = copy.deepcopy(net)  # of a model whose hooks know an optimizer, which is none of the copy's
    handle = save_mean(net, optimizer)
    assert handle._handles == []
    optimizer.train()
    average = AveragedModel(twin)
    average.update_parameters(twin)
    assert optimizer.holds_sample
    assert all(map(torch.equal, average.module.parameters(), twin.parameters()))


# ---- at_mean ---------------------------------------------------------------------------------------------------------


def by_hand(average: nn.Module, net: nn.Module) -> None:
    with torch.no_grad():
        for mine, new in zip(average.parameters(), net.parameters(), strict=True):
            mine.lerp_(new, 0.5)


@FUSED
def test_an_average_by_hand_in_at_mean(fused: bool) -> None:
    net, optimizer = build(sample_in_step=fused)
    average = copy.deepcopy(net)
    start = net[0].weight.detach().clone()
    for _ in range(3):
        optimizer.train()
        backward(net)
        with optimizer.at_mean():
            assert not optimizer.holds_sample
            by_hand(average, net)
        optimizer.step()
        optimizer.zero_grad()
        with optimizer.at_mean():
            by_hand(average, net)
    assert torch.equal(average[0].weight, start)


def test_at_mean_gives_back_what_it_found() -> None:
    net, optimizer = build()

    def held() -> Tensor:
        return net[0].weight.detach().clone()

    mean = held()
    with optimizer.at_mean():
        assert torch.equal(held(), mean)
    assert not optimizer.holds_sample
    with optimizer.sampled_params(sample=3):
        sample = held()
        with pytest.raises(ZeroDivisionError), optimizer.at_mean():
            1 / bool(not torch.equal(held(), mean))
        assert torch.equal(held(), sample)
    with optimizer.sampled_params(train=True):
        sample = held()
        with optimizer.at_mean(), optimizer.at_mean():
            assert torch.equal(held(), mean)
        assert torch.equal(held(), sample)
        backward(net)
    optimizer.step()
    optimizer.train()
    with optimizer.at_mean():
        optimizer.eval()  # who lets the sample go in the block does not get it back
    assert not optimizer.holds_sample
    optimizer.train()
    backward(net)
    with optimizer.at_mean():
        optimizer.step()
    assert not optimizer.holds_sample


def test_a_gradient_that_was_computed_in_at_mean_is_refused() -> None:
    net, optimizer = build()
    optimizer.train()
    with pytest.raises(RuntimeError, match=r"was computed while the weights held the mean"), optimizer.at_mean():
        backward(net)


# ---- Lightning -------------------------------------------------------------------------------------------------------


class Normed(Regression):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.filterwarnings("ignore:SWA is currently only supported")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["SWA first", "IVON first"])
def test_swa_collects_statistics_at_the_averaged_mean(first: bool, accumulate: int) -> None:
    module = Normed(sample_in_step=accumulate == 2)
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    callbacks = [swa, IVONCallback()] if first else [IVONCallback(), swa]
    trainer(max_epochs=3, callbacks=callbacks, accumulate_grad_batches=accumulate).fit(module, data())
    inputs = torch.cat([batch[0] for batch in data()])
    expected = module.net[0](inputs).mean(0)
    torch.testing.assert_close(module.net[1].running_mean, expected, rtol=0, atol=1e-5)
    averaged = swa._average_model.parameters()
    assert all(map(torch.equal, module.parameters(), averaged))
    assert not module.trainer.optimizers[0].holds_sample
    assert "_run_only" not in repr(vars(module.trainer.optimizers[0]).get("step"))


@FUSED
@pytest.mark.parametrize("first", [True, False], ids=["EMA first", "IVON first"])
def test_lightnings_own_ema_averages_the_mean(first: bool, fused: bool) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    module = Regression(sample_in_step=fused, lr=0.0)
    start = [p.detach().clone() for p in module.parameters()]
    ema = averaging.WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5))
    callbacks = [ema, IVONCallback()] if first else [IVONCallback(), ema]
    trainer(max_epochs=2, callbacks=callbacks).fit(module, data())
    for mean, averaged in zip(start, module.parameters(), strict=True):
        torch.testing.assert_close(averaged.detach(), mean, rtol=0, atol=1e-6)
