"""Which backend goes by a name: `choose` and `override`."""

from __future__ import annotations

import pytest
import torch

from ivon_kernels import IVON, available_backends, backends
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
