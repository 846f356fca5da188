"""No gradient is dropped in silence, and none of the mean passes for a sample's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ivon_kernels import IVON

OPTIONS: dict[str, Any] = {"lr": 0.5, "ess": 1000.0, "hess_init": 0.1, "seed": 1}
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))


def adapters() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(8, 8), nn.Linear(8, 8)


def use(on: nn.Module, off: nn.Module) -> nn.Module:
    """What PEFT's set_adapter does."""
    on.requires_grad_(True)
    off.requires_grad_(False)
    return on


def loss_of(net: Callable[[Tensor], Tensor]) -> Tensor:
    return net(X).square().mean()


# ---- gradients of what was not in the sample -------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [True, False])
def test_train_again_takes_in_what_was_unfrozen(with_state: bool, backend: str) -> None:
    a, b = adapters()
    if not with_state:
        b.requires_grad_(False)
    optimizer = IVON([*a.parameters(), *b.parameters()], **OPTIONS, backend=backend)
    use(a, b)
    for step in range(6):
        net, other = (a, b) if step % 2 == 0 else (b, a)
        before, untouched = (optimizer.mean_of(n.weight).clone() for n in (net, other))
        optimizer.train()  # the Trainer's
        use(net, other)  # in compute_loss
        optimizer.train()
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(net.weight, before) and torch.equal(other.weight, untouched)
    assert int(optimizer.state[a.weight]["step"]) == int(optimizer.state[b.weight]["step"]) == 3


def test_without_that_the_step_names_the_parameter(backend: str) -> None:
    a, b = adapters()
    names = [(f"{kind}.{n}", p) for kind, net in (("a", a), ("b", b)) for n, p in net.named_parameters()]
    optimizer = IVON(names, **OPTIONS, backend=backend)
    use(a, b)
    optimizer.train()
    loss_of(use(b, a)).backward()
    with pytest.raises(
        RuntimeError, match=r"b\.weight has a gradient, but was frozen .* call optimizer\.train\(\) again"
    ):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.train()
    loss_of(b).backward()
    optimizer.step()
    assert int(optimizer.state[b.weight]["step"]) == 1


def test_frozen_again_before_the_step() -> None:
    a, b = adapters()
    optimizer = IVON([*a.parameters(), *b.parameters()], **OPTIONS)
    use(a, b)
    optimizer.train()
    loss_of(use(b, a)).backward()
    use(a, b)
    with pytest.raises(RuntimeError, match="has a gradient, but was frozen"):
        optimizer.step()


def test_an_old_gradient_of_a_frozen_parameter_is_nobodys_loss() -> None:
    a, b = adapters()
    optimizer = IVON([*a.parameters(), *b.parameters()], **OPTIONS)
    optimizer.train()
    (loss_of(a) + loss_of(b)).backward()
    optimizer.step()
    use(a, b)  # b keeps the gradient that was taken
    a.zero_grad()
    optimizer.train()
    loss_of(a).backward()
    optimizer.step()
    assert int(optimizer.state[b.weight]["step"]) == 1


def test_frozen_between_two_samples_its_first_gradient_counts(backend: str) -> None:
    a, b = adapters()
    optimizer = IVON([*a.parameters(), *b.parameters()], **OPTIONS, backend=backend)
    before = b.weight.detach().clone()
    with optimizer.sampled_params(train=True):
        (loss_of(a) + loss_of(b)).backward()
    use(a, b)
    with optimizer.sampled_params(train=True):
        loss_of(a).backward()
    optimizer.step()
    assert int(optimizer.state[b.weight]["step"]) == 1 and not torch.equal(b.weight, before)


def test_unfrozen_between_two_samples_in_train_mode(backend: str) -> None:
    a, b = adapters()
    optimizer = IVON([*a.parameters(), *b.parameters()], **OPTIONS, backend=backend)
    use(a, b)
    mean = b.weight.detach().clone()
    optimizer.train()
    loss_of(a).backward()
    use(b, a)
    optimizer.next_sample()
    assert not torch.equal(b.weight, mean)
    loss_of(b).backward()
    optimizer.step()
    assert [int(optimizer.state[net.weight]["step"]) for net in (a, b)] == [1, 1]


def test_weights_edited_while_frozen_are_the_mean_when_they_join(backend: str) -> None:
    a, b = adapters()
    optimizer = IVON([*a.parameters(), *b.parameters()], **OPTIONS, backend=backend)
    use(a, b)
    optimizer.train()
    with torch.no_grad():
        b.weight.fill_(0.25)
    b.requires_grad_(True)
    optimizer.train()
    optimizer.eval()
    assert (b.weight == 0.25).all()


# ---- gradients that were computed at the mean ------------------------------------------------------------------------


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_after_the_block(reentrant: bool, backend: str) -> None:
    net = body()
    optimizer = IVON(net.named_parameters(), **OPTIONS, backend=backend)
    mean = net[0].weight.detach().clone()
    with optimizer.sampled_params(train=True):
        loss = loss_of(lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant))
    loss.backward()
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight was computed while the weights held the mean"):
        optimizer.step()
    assert torch.equal(net[0].weight, mean)
    optimizer.zero_grad()
    optimizer.train()
    loss_of(net).backward()
    optimizer.step()


@pytest.mark.parametrize("then", ["step", "train", "next block"])
def test_backward_after_eval(then: str) -> None:
    net = body()
    optimizer = IVON(net.parameters(), **OPTIONS)
    optimizer.train()
    loss = loss_of(lambda x: checkpoint(net, x, use_reentrant=False))
    optimizer.eval()
    loss.backward()
    calls = {"step": optimizer.step, "train": optimizer.train}
    with pytest.raises(RuntimeError, match="was computed while the weights held the mean"):
        calls.get(then, optimizer.sampled_params(train=True).__enter__)()


def test_added_to_a_gradient_of_the_sample_while_the_mean_is_in_the_weights() -> None:
    net = body()
    optimizer = IVON(net.parameters(), **OPTIONS)
    optimizer.train()
    loss_of(net).backward()
    loss = loss_of(lambda x: checkpoint(net, x, use_reentrant=False))
    optimizer.eval()
    loss.backward()
    with pytest.raises(RuntimeError, match="was computed while the weights held the mean"):
        optimizer.train()


def test_between_two_blocks() -> None:
    net = body()
    optimizer = IVON(net.parameters(), **OPTIONS)
    with optimizer.sampled_params(train=True):
        loss_of(net).backward()
    with optimizer.sampled_params(train=True):
        loss = loss_of(lambda x: checkpoint(net, x, use_reentrant=False))
    loss.backward()
    with pytest.raises(RuntimeError, match="was computed while the weights held the mean"):
        optimizer.step()


def test_what_is_done_to_the_samples_own_gradients_is_fine() -> None:
    net = body()
    optimizer = IVON(net.parameters(), **OPTIONS)
    optimizer.train()
    loss_of(net).backward()
    optimizer.eval()
    with torch.no_grad():
        loss_of(net)  # a validation
    optimizer.train()
    loss_of(net).backward()
    optimizer.eval()
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    with optimizer.sampled_params(train=True):
        loss_of(net).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    assert int(optimizer.state[net[0].weight]["step"]) == 2


def test_a_gradient_that_only_some_have_in_the_block() -> None:
    net = body()
    optimizer = IVON(net.parameters(), **OPTIONS)
    with optimizer.sampled_params(train=True):
        net[0](X).square().mean().backward()
    optimizer.step()
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [1, 1, 0, 0]
