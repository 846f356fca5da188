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


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same global seed and one thread for every test, whatever ran before it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
