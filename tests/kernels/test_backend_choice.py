"""Which backend goes by a name: `choose` and `override`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from ivon_kernels import IVON, available_backends, backends
from ivon_kernels.backends.cpu import CpuBackend
from ivon_kernels.backends.reference import ReferenceBackend
from tests.support.helpers import OPTIONS, bowl, parameters, train

CPU = torch.device("cpu")


class Recorder(ReferenceBackend):
    """Backend reference, which counts its steps."""

    steps = 0

    def step(self, *args: object, **kwargs: object) -> None:
        self.steps += 1
        super().step(*args, **kwargs)  # type: ignore[arg-type]


def test_another_backend_goes_by_the_name_within_the_block() -> None:
    recorder = Recorder()
    with backends.override("reference", recorder):
        optimizer = IVON(params := parameters(3), backend="reference", seed=1, **OPTIONS)
        assert backends.choose("reference", CPU, torch.float32) is recorder
        train(optimizer, params, 2, loss=bowl)
    assert recorder.steps == 2
    assert backends.choose("reference", CPU, torch.float32) is not recorder


def test_a_backend_that_is_taken_away_is_not_chosen() -> None:
    before = available_backends()
    with backends.override("cpu", None):
        assert list(available_backends()) == [name for name in before if name != "cpu"]
        assert backends.choose(None, CPU, torch.float32).name == "reference"
        with pytest.raises(ValueError, match="there is no backend 'cpu'"):
            IVON(parameters(3), backend="cpu", **OPTIONS)


def test_everything_is_as_before_after_the_block_also_when_it_raises() -> None:
    before = available_backends()

    def inside() -> None:
        with backends.override("reference", None), backends.override("new", ReferenceBackend()):
            assert list(available_backends())[-1] == "new"
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert list(available_backends().items()) == list(before.items())  # in the order of choice


class NeverBuilt(CpuBackend):
    """Backend cpu in a checkout that was not installed."""

    def unavailable(self) -> str | None:
        return "its native part was never built; run 'pip install -e .' in the checkout"


@pytest.fixture
def never_built() -> Iterator[None]:
    backends._warn_of_slow_steps.cache_clear()
    with backends.override("cpu", NeverBuilt()):
        yield
    backends._warn_of_slow_steps.cache_clear()


@pytest.mark.usefixtures("never_built")
def test_without_the_compiled_library_slow_steps_are_warned_of_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            train(IVON(params := parameters(3), seed=1, **OPTIONS), params, 1, loss=bowl)
    (warning,) = said
    assert "about 150 times as long" in str(warning.message)
    assert str(warning.message).endswith("; run 'pip install -e .' in the checkout")


@pytest.mark.usefixtures("never_built")
def test_nobody_is_warned_of_what_they_chose_or_what_no_library_takes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IVON(parameters(3), backend="reference", **OPTIONS)
        IVON([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], **OPTIONS)
        with backends.override("cpu", None):
            IVON(parameters(3), **OPTIONS)
