"""The optimizer steps of the speed suite under pytest-benchmark: ``pytest benchmarks [--full]``.

A group is a workload in a dtype; ours and the peers are its rows. Before it is timed, every backend of ours must equal
the reference backend bit for bit, and every peer must change the weights, and to finite values.

This is for a look at one contender (``-k``), a profile or a histogram, with all of pytest-benchmark's options. The
record and the comparisons come from ``python -m benchmarks speed``, where the contenders take turns.
"""

from __future__ import annotations

import functools
import itertools
import timeit
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.speed.clock import clock
from benchmarks.speed.contender import BASELINE, IVON_OPT, LARGE_STEPS, STEP, Contender
from benchmarks.speed.peers import ONE_LAUNCH, PLAIN, lineup, our_name
from benchmarks.speed.verify import Verifier
from benchmarks.speed.workloads import DTYPES, WORKLOADS, Workload

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

QUICK_WORKLOADS = ("smollm2-135m-r8-qv", "450-tiny")
QUICK_CONTENDERS = (BASELINE, our_name("cpu", PLAIN), our_name("cpu", ONE_LAUNCH), IVON_OPT)
QUICK_SECONDS, FULL_SECONDS = 0.3, 1.0  # for one row, at most; five rounds at least
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One row for each workload, dtype and contender: a few, or with ``--full`` all."""
    full = metafunc.config.getoption("full")
    few = not full and DEVICE.type == "cpu"
    steps = [c for c in lineup(DEVICE) if c.quantity == STEP and (not few or c.name in QUICK_CONTENDERS)]
    workloads = [workload for workload in WORKLOADS if full or workload.name in QUICK_WORKLOADS]
    rows = [
        pytest.param(workload, dtype, contender, id=f"{workload.name}-{dtype}-{contender.name}")
        for workload, dtype, contender in itertools.product(workloads, DTYPES if full else ("float32",), steps)
    ]
    metafunc.parametrize(("workload", "dtype", "contender"), rows)


@functools.cache
def _verifier(workload: Workload, dtype: str) -> Verifier:
    """Keeps what the reference gives, which takes longer than the steps."""
    return Verifier(workload, DTYPES[dtype], DEVICE, clock(DEVICE.type, dry_run=False).reference_elements)


@pytest.mark.filterwarnings("ignore::UserWarning:ivon")  # on every construction, from inside torch
def test_speed(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, workload: Workload, dtype: str, contender: Contender
) -> None:
    """Checks a contender and times one optimizer step."""
    if reason := contender.missing():
        pytest.skip(reason)
    if DEVICE.type == "cpu" and workload.elements > (contender.most_elements or workload.elements):
        pytest.skip("too slow on a processor at this size")
    if reason := _verifier(workload, dtype).check(contender):
        pytest.fail(reason, pytrace=False)
    step = contender.build(workload.parameters(DTYPES[dtype], DEVICE), LARGE_STEPS)

    def finished() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    finished()  # makes the state, and compiles
    benchmark.group, benchmark.name = f"{workload.title}, {dtype}", contender.name
    seconds = FULL_SECONDS if request.config.getoption("full") else QUICK_SECONDS
    once = timeit.timeit(finished, number=1)
    benchmark.pedantic(finished, rounds=max(5, min(200, int(seconds / once))))
