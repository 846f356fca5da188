"""``step(closure)`` takes the gradients of its own sample and no others; wrappers that pass for IVON are IVON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from tests.support.helpers import OPTIONS, assert_same, bowl, parameters, snapshot


def fresh(backend: str, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters((4, 3), (5,))
    return IVON(params, backend=backend, seed=5, **{**OPTIONS, **options}), params


def closure_of(params: list[nn.Parameter], clear: Callable[[], None]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        clear()
        loss = bowl(params, 0)
        loss.backward()
        return loss

    return closure


def blocks(backend: str, steps: int = 3) -> dict[str, Tensor]:
    """What the closures below have to equal."""
    optimizer, params = fresh(backend)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            bowl(params, 0).backward()
        optimizer.step()
    return snapshot(optimizer)


def do_nothing() -> None:
    """What Lightning calls ``step`` with in manual optimization."""


@pytest.mark.parametrize("way", ["to None", "to zero", "to zero before", "model's"])
def test_a_closure_may_clear_in_every_way(backend: str, way: str) -> None:
    optimizer, params = fresh(backend)
    model = nn.ParameterList(params)
    clear = {
        "to None": optimizer.zero_grad,
        "to zero": lambda: optimizer.zero_grad(set_to_none=False),
        "to zero before": do_nothing,
        "model's": model.zero_grad,
    }[way]
    for _ in range(3):
        if way == "to zero before":
            optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure_of(params, clear))
    assert_same(blocks(backend), snapshot(optimizer))


@pytest.mark.parametrize("closure", ["adds", "does nothing"])
def test_a_gradient_from_before_the_sample_is_an_error(backend: str, closure: str) -> None:
    """As with gradients accumulated at the mean, or computed there by a loop that forgot to sample."""
    optimizer, params = fresh(backend)
    before = snapshot(optimizer)
    bowl(params, 0).backward()
    with pytest.raises(RuntimeError, match=r"did not clear the gradients.*call optimizer.train\(\)"):
        optimizer.step(closure_of(params, do_nothing) if closure == "adds" else do_nothing)
    assert_same(before, snapshot(optimizer))


def test_a_closure_may_add_to_gradients_of_its_own_sample(backend: str) -> None:
    expected, others = fresh(backend)
    with expected.sampled_params(train=True):
        for _ in range(2):
            bowl(others, 0).backward()
    expected.step()
    optimizer, params = fresh(backend)
    optimizer.train()
    bowl(params, 0).backward()
    optimizer.step(closure_of(params, do_nothing))
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("modes", [False, True], ids=["context", "modes"])
def test_a_closure_that_does_nothing_adds_no_sample(backend: str, modes: bool, samples: int) -> None:
    results = []
    for closure in (None, do_nothing):
        optimizer, params = fresh(backend, mc_samples=samples)
        for _ in range(3):
            for sample in range(samples):
                if modes:
                    optimizer.next_sample() if sample else optimizer.train()
                    bowl(params, sample).backward()
                else:
                    with optimizer.sampled_params(train=True):
                        bowl(params, sample).backward()
            optimizer.step(closure)
            optimizer.zero_grad()
        results.append(snapshot(optimizer))
    for key, value in results[0].items():  # a sum of gradients is divided once more or less
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-6)


# ---- wrappers --------------------------------------------------------------------------------------------------------


class Wrapper:
    """As Lightning's and Fabric's: its class becomes one that inherits from the optimizer's."""

    def __init__(self, optimizer: IVON) -> None:
        self._optimizer = optimizer
        self.calls = 0
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> IVON:
        return self._optimizer

    def step(self) -> None:
        self.calls += 1
        self._optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_a_wrapper_that_inherits_acts_on_what_it_wraps(backend: str) -> None:
    optimizer, params = fresh(backend)
    wrapper: Any = Wrapper(optimizer)
    assert isinstance(wrapper, IVON)
    for step in range(3):
        if step == 1:
            wrapper.train()
            assert optimizer.holds_sample
            bowl(params, 0).backward()
        else:
            with wrapper.sampled_params(train=True):
                bowl(params, 0).backward()
        wrapper.step()
        wrapper.zero_grad()
        wrapper.eval()
    assert wrapper.calls == 3 and wrapper.seed == 5 and set(vars(wrapper)) == {"_optimizer", "calls"}
    assert_same(blocks(backend), snapshot(optimizer))


def test_a_subclass_with_a_mixin_is_an_optimizer_of_its_own(backend: str) -> None:
    class Mixin:
        optimizer = "adam"

        def train(self) -> None:
            self.trained = True
            super().train()  # type: ignore[misc]

    class Mine(Mixin, IVON):
        pass

    params = parameters((4, 3), (5,))
    optimizer = Mine(params, backend=backend, seed=5, **OPTIONS)
    for _ in range(3):
        optimizer.train()
        bowl(params, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.trained
    assert_same(blocks(backend), snapshot(optimizer))
