"""Whatever is done to an optimizer and its parameters, in any order: the mean is never lost, no gradient in silence."""

from __future__ import annotations

import contextlib
import gc
import threading
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.events import Events, happen
from tests.support.helpers import slow_but

OPTIMIZERS, THREADS, EVENTS = 20, 4, 10_000


@pytest.mark.parametrize("backend", slow_but(["cpu", "reference"], "cpu"))
def test_any_order_of_events(backend: str) -> None:
    class Machine(Events):
        pass

    Machine.backend = backend
    run_state_machine_as_test(Machine, settings=settings(stateful_step_count=20))


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())  # asking the object may warn


@pytest.mark.slow
def test_ten_thousand_events_of_twenty_optimizers_in_four_threads() -> None:
    """The means are checked after each event; in the second half of them the tensors are no more than in the first."""
    errors: list[BaseException] = []
    halfway, counted = threading.Barrier(THREADS + 1), threading.Barrier(THREADS + 1)

    def run(thread: int) -> None:
        random = Random(thread)
        try:
            machines = [Events() for _ in range(OPTIMIZERS // THREADS)]
            for events in machines:
                events.start(count=random.randint(1, 4), fused=random.random() < 0.5)
            for _ in range(2):
                for _ in range(EVENTS // THREADS // 2):
                    happen(random.choice(machines), random)
                for events in machines:  # nothing is left of what was going on
                    events.forget()
                    events.saved = None
                    events.means = {p: events.means[p] for p in events.params}
                halfway.wait()
                counted.wait()
        except BaseException as error:
            errors.append(error)
            halfway.abort()
            counted.abort()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    found = []
    with contextlib.suppress(threading.BrokenBarrierError):
        for _ in range(2):
            halfway.wait()
            found.append(live_tensors())
            counted.wait()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    # Of an optimizer there are at most four parameters, each with its mean that is expected, a gradient and its state.
    assert found[1] - found[0] <= OPTIMIZERS * 4 * 20
