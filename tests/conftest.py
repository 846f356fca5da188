"""Fixtures and settings for every test file."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything asks whether backend triton can be had

import pytest
import torch
from hypothesis import settings

from ivon_kernels import available_backends
from ivon_kernels.backends.triton_launch import installed, interpreted
from tests.support import fast_interpreter, shake
from tests.support.cuda_emulator import emulated
from tests.support.helpers import normals_computed_once
from tests.support.matrix import INTERPRETED
from tests.support.ranks import Ranks

gc.disable()  # until the tests are collected: imports leave little garbage, and the look for it takes a quarter longer
interpreted()  # decides it for good: a test may change the variable later

# The suite gives the same verdict every time; HYPOTHESIS_PROFILE=explore looks further, with fresh examples.
settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2000, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

ALL_BACKENDS = ("reference", "cpu", "cuda", "triton")


@pytest.hookimpl(tryfirst=True)  # before ``-m`` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out backend triton where a test is not marked ``on_triton``; the rest of it is ``slow``. Notebooks first.

    Triton's interpreter takes about 0.3 s for a step of two small tensors, so that of the front end's tests it runs one
    or two of each promise. Its kernels are compared with the reference in files of their own. A notebook is one test of
    minutes: at the end one worker would run it while the others wait.
    """

    left_out = []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("backend") == "triton" and item.get_closest_marker("on_triton") is None:
            left_out.append(item)
        elif params.get("backend") == "triton" or params.get("target") == INTERPRETED:
            item.add_marker(pytest.mark.slow)
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


def pytest_collection_finish() -> None:
    """From here on garbage is collected: see :func:`_little_to_look_through`."""
    gc.enable()


def pytest_sessionfinish() -> None:
    """Triton's bindings would call what is not freed at exit a leak."""
    gc.unfreeze()


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, on CPU tensors: ``cuda`` is its emulator, ``triton`` runs under its interpreter.

    One that is missing is skipped with its reason.
    """
    name = str(request.param)
    with emulated(name):
        if reason := available_backends()[name]:
            pytest.skip(f"backend {name}: {reason}")
        yield name


@pytest.fixture(scope="module")
def known_normals() -> Iterator[None]:
    """For a file whose runs see the same noise many times."""
    with normals_computed_once():
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that run a function as the ranks of a process group: ``ranks.run(world_size, function, *args)``."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def _as_asked() -> None:
    """Before the fixtures of modules, whose results tests compare: a matrix product's rounding depends on it."""
    shake.start()
    if installed() and interpreted():
        fast_interpreter.install()


@pytest.fixture(scope="module", autouse=True)
def _little_to_look_through() -> None:
    """Garbage is not looked for in what the imports and earlier files left, which takes up to a second each time.

    For each file anew, because the speed benchmark, which does the same, thaws everything when it ends.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same global seed for every test, and the number of threads again after one that took more."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(shake.THREADS)
