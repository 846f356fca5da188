"""CUDA graphs: replays of one captured training step are further steps, with the bits of the eager run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ivon_kernels import IVON, NonFiniteGradientError
from tests.support import gpu_training
from tests.support.gpu_training import assert_equal, everything, fresh, loss, on_cpu, reference, shift_of, train
from tests.support.matrix import GPU_TARGETS, Target

pytestmark = [
    pytest.mark.gpu,
    # Warm-up and capture run on streams of their own, one after the other.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
]
WARM_UP = 3
REPLAYS = 5


class Graph(Protocol):
    def replay(self) -> None: ...


@pytest.fixture(params=GPU_TARGETS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    target: Target = request.param
    with target.in_use():
        yield target.backend


def warm_up(step: Callable[[], None]) -> None:
    """One step on a stream of its own, as torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(step: Callable[[], None]) -> Graph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class Loop:
    """A training step that reads its input from a tensor, so that a graph can be replayed with another."""

    def __init__(self, optimizer: IVON, params: list[torch.nn.Parameter], samples: int = 1) -> None:
        self.optimizer, self.params, self.samples = optimizer, params, samples
        self.shift = torch.zeros((), device=gpu_training.DEVICE)
        self.schedule = LambdaLR(optimizer, lambda step: 0.8**step)

    def step(self) -> None:
        shift = self.shift
        for sample in range(self.samples):
            if sample:
                self.optimizer.next_sample()
            self.optimizer.train()
            self.optimizer.zero_grad()
            loss(self.params, shift).backward()
        self.optimizer.step()

    def run(self, number: int, how: Callable[[], Any]) -> None:
        self.shift.fill_(shift_of(number))
        how()
        self.schedule.step()

    def warm_up(self) -> None:
        for number in range(WARM_UP):
            self.run(number, lambda: warm_up(self.step))

    def replays(self, graph: Graph, start: int = WARM_UP) -> list[Tensor]:
        """The weights after each replay."""
        seen = []
        for number in range(start, start + REPLAYS):
            self.run(number, graph.replay)
            seen.append(on_cpu(self.params))
        return seen


def eager(steps: int, dtype: torch.dtype, samples: int = 1, **options: Any) -> tuple[IVON, list[Tensor]]:
    """The reference on the CPU; weights after each step after the warm-up."""
    optimizer, params = reference(dtype, **options)
    schedule = LambdaLR(optimizer, lambda step: 0.8**step)
    seen = []
    for number in range(steps):
        train(optimizer, params, 1, start=number, samples=samples)
        schedule.step()
        seen.append(on_cpu(params))
    return optimizer, seen[WARM_UP:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("in_step", [False, True], ids=["train and step", "sample_in_step"])
def test_replays_equal_the_eager_run(backend: str, in_step: bool, samples: int, dtype: torch.dtype) -> None:
    """With a schedule; the eager loop then goes on where the replays ended, and the replays after that."""
    optimizer, params = fresh(backend, dtype=dtype, capturable=True, sample_in_step=in_step)
    held = [group["lr"] for group in optimizer.param_groups]
    loop = Loop(optimizer, params, samples)
    loop.warm_up()
    graph = capture(loop.step)
    weights = loop.replays(graph)
    for number in range(WARM_UP + REPLAYS, WARM_UP + REPLAYS + 2):
        loop.run(number, loop.step)
        weights.append(on_cpu(params))
    weights += loop.replays(graph, WARM_UP + REPLAYS + 2)
    steps = WARM_UP + 2 * REPLAYS + 2
    expected, others = eager(steps, dtype, samples, sample_in_step=in_step)
    for left, right in zip(weights, others, strict=True):
        assert torch.equal(left, right)
    assert len({tuple(w.tolist()) for w in weights}) == len(weights)
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))
    assert_equal(optimizer, expected)
    assert all(int(optimizer.state[p]["step"]) == steps for p in params)


def test_every_replay_draws_fresh_noise(backend: str) -> None:
    """Nothing moves and nothing is remembered but the Hessian of one step, which is made of its noise."""
    optimizer, params = fresh(backend, capturable=True, lr=0.0, beta2=0.0)
    optimizer.param_groups[1]["lr"] = 0.0
    loop = Loop(optimizer, params)
    loop.warm_up()
    graph = capture(loop.step)
    seen = []
    for _ in range(REPLAYS):
        graph.replay()
        seen.append(on_cpu([optimizer.state[p]["hess"] for p in params]))
    assert len({tuple(hess.tolist()) for hess in seen}) == REPLAYS


@pytest.mark.parametrize("capturable", [False, True])
def test_a_state_dict_after_replays(backend: str, capturable: bool) -> None:
    optimizer, params = fresh(backend, capturable=True)
    loop = Loop(optimizer, params)
    loop.warm_up()
    loop.replays(capture(loop.step))
    saved = optimizer.state_dict()
    resumed, others = fresh(backend, capturable=capturable, seed=1)
    resumed.load_state_dict(saved)
    for who, its in ((optimizer, params), (resumed, others)):
        train(who, its, 2, start=WARM_UP + REPLAYS)
    assert_equal(resumed, optimizer)
    assert all(int(optimizer.state[p]["step"]) == WARM_UP + REPLAYS + 2 for p in params)


def test_a_replayed_step_with_a_bad_gradient(backend: str) -> None:
    """The replay does not take it; the host reports it at the next step that it takes itself."""
    optimizer, params = fresh(backend, capturable=True)
    loop = Loop(optimizer, params)
    loop.warm_up()
    graph = capture(loop.step)
    before = everything(optimizer)
    loop.shift.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(optimizer, before)
    with pytest.raises(NonFiniteGradientError, match=r"param_groups\[0\]\['params'\]\[0\]"):
        train(optimizer, params, 1)
    loop.replays(graph)
    assert all(int(optimizer.state[p]["step"]) == WARM_UP + REPLAYS for p in params)


@pytest.mark.parametrize("what", ["train", "step"])
def test_a_capture_without_capturable_is_an_error(backend: str, what: str) -> None:
    optimizer, params = fresh(backend)
    train(optimizer, params, 2)
    scratch = torch.zeros(1, device=gpu_training.DEVICE)
    for p in params:
        p.grad = torch.ones_like(p)
    if what == "step":
        optimizer.train()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scratch.add_(1)  # torch warns of empty graphs
        with pytest.raises(RuntimeError, match="was built with capturable=False"):
            getattr(optimizer, what)()
    optimizer.discard_samples()
    train(optimizer, params, 2, start=2)
    expected, others = reference()
    train(expected, others, 4)
    assert_equal(optimizer, expected)
