"""Fixtures and settings for every test file."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ivon_kernels import available_backends

# The suite gives the same verdict every time; HYPOTHESIS_PROFILE=explore looks further, with fresh examples.
settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2000, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

CPU_BACKENDS = ("reference", "cpu")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that computes on the CPU; one that is missing is skipped with its reason."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Before the fixtures of modules, whose results tests compare: a matrix product's rounding depends on it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same global seed for every test, and one thread again after one that took more."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
