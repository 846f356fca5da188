"""Properties over shapes, dtypes, groups and call orders, found by hypothesis rather than listed.

The mean is never lost, hess + weight_decay stays positive, contexts and modes agree bit for bit.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from ivon_kernels import IVON, noise
from tests.support.helpers import (
    Equations,
    assert_same,
    flat,
    parameters,
    relative_error,
    snapshot,
)

pytestmark = [
    pytest.mark.usefixtures("known_normals"),
    pytest.mark.filterwarnings("ignore:every parameter group has weight_decay=0"),
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # any settings at all
]

SEED = 11
# The `backend` fixture gives every example the same value.
per_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


sizes = st.one_of(st.integers(0, 40), st.sampled_from([1023, 1025]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.one_of(
    st.tuples(sizes), st.just(()), st.tuples(st.integers(0, 6), st.integers(0, 6)), st.tuples(*[st.integers(1, 4)] * 4)
)


@st.composite
def hyperparameters(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lr": draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0])),
        "ess": draw(st.sampled_from([1.0, 1e3, 1e8])),
        "hess_init": draw(st.sampled_from([1e-4, 0.1, 1.0, 30.0])),
        "beta1": draw(st.sampled_from([0.0, 0.9, 0.999])),
        "beta2": draw(st.sampled_from([0.0, 0.9, 0.99999])),
        "weight_decay": draw(st.sampled_from([0.0, 1e-4, 0.3])),
        "hess_approx": draw(st.sampled_from(["price", "gradsq"])),
        "clip_radius": draw(st.sampled_from([1e-3, 0.5, math.inf])),
        "debias": draw(st.booleans()),
        "rescale_lr": draw(st.booleans()),
    }


@st.composite
def models(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Groups of parameters of any shape, with any hyperparameters; a group may be empty."""
    groups = draw(
        st.lists(st.tuples(st.lists(st.tuples(shapes, dtypes), max_size=3), hyperparameters()), min_size=1, max_size=3)
    )
    return [
        {"params": [parameters(shape, dtype=dtype, seed=i)[0] for i, (shape, dtype) in enumerate(content)], **hyper}
        for content, hyper in groups
    ]


def copied(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    groups = copy.deepcopy(groups)
    return groups, [p for group in groups for p in group["params"]]


def gradient(p: Tensor, key: tuple[int, ...]) -> Tensor:
    """Multiples of 1/4 of at most 4: exact, and so are sums of many, in every dtype."""
    generator = torch.Generator().manual_seed(hash(key) % 2**63)
    return (torch.randint(-16, 17, p.shape, generator=generator) / 4).to(p.dtype)


def backward(params: list[nn.Parameter], key: int) -> None:
    for i, p in enumerate(params):
        (gradient(p, (key, i)) * p).sum().backward()


@pytest.mark.slow
@per_backend
@given(groups=models(), samples=st.lists(st.integers(1, 3), min_size=1, max_size=4), zero=st.booleans())
def test_contexts_and_modes_agree(backend: str, groups: list[dict[str, Any]], samples: list[int], zero: bool) -> None:
    (left, left_params), (right, right_params) = copied(groups), copied(groups)
    contexts = IVON(left, 0.1, 10.0, seed=SEED, backend=backend)
    modes = IVON(right, 0.1, 10.0, seed=SEED, backend=backend)
    for step, count in enumerate(samples):
        contexts.zero_grad()
        modes.zero_grad()
        for sample in range(count):
            with contexts.sampled_params(train=True):
                if zero:
                    contexts.zero_grad()
                seen = copy.deepcopy(left_params)
                backward(left_params, step * 10 + sample)
            if sample:
                modes.next_sample()
            modes.train()
            if zero:
                modes.zero_grad()
            assert all(torch.equal(p, q) for p, q in zip(right_params, seen, strict=True))
            backward(right_params, step * 10 + sample)
        contexts.step()
        modes.step()
        assert_same(snapshot(contexts), snapshot(modes))


@pytest.mark.slow
@per_backend
@given(groups=models(), steps=st.integers(0, 3), inside=st.booleans())
def test_a_saved_state_comes_back_exactly(backend: str, groups: list[dict[str, Any]], steps: int, inside: bool) -> None:
    (left, left_params), (right, right_params) = copied(groups), copied(groups)
    optimizer = IVON(left, 0.1, 10.0, seed=SEED, backend=backend)
    for step in range(steps):
        optimizer.train()
        optimizer.zero_grad()
        backward(left_params, step)
        optimizer.step()
    if inside:
        optimizer.train()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.eval()
    other = IVON(right, 0.1, 10.0, seed=99, backend=backend)
    with torch.no_grad():
        for p, q in zip(left_params, right_params, strict=True):
            q.copy_(p)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(snapshot(optimizer), snapshot(other))


@per_backend
@given(
    hyper=hyperparameters(),
    magnitudes=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e4, 1e8, 1e12]), min_size=1, max_size=8),
    sign=st.sampled_from(["with the noise", "against the noise", "random"]),
)
def test_hess_stays_positive_under_adversarial_gradients(
    backend: str, hyper: dict[str, Any], magnitudes: list[float], sign: str
) -> None:
    """Against the noise, every estimate of "price" is as negative as the magnitude allows."""
    p = nn.Parameter(torch.ones(65))
    optimizer = IVON([{"params": [p], **hyper}], 0.1, 10.0, seed=SEED, backend=backend)
    decay = hyper["weight_decay"]
    for step, magnitude in enumerate(magnitudes):
        eps = noise.normals(65, seed=SEED, step=step)
        direction = {"with the noise": eps.sign(), "against the noise": -eps.sign()}.get(sign, eps.roll(1).sign())
        optimizer.train()
        assert p.isfinite().all(), "the sample"
        p.grad = magnitude * direction
        optimizer.step()
        hess = optimizer.state[p]["hess"]
        assert ((hess + decay) > 0).all() and hess.isfinite().all()
        assert p.isfinite().all() and optimizer.state[p]["momentum"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999])
def test_hess_stays_positive_under_the_worst_gradients(backend: str, beta2: float, weight_decay: float) -> None:
    """The gradient that halves hess + weight_decay, the most that one step can, two hundred times.

    In exact arithmetic it stays positive for ever; 0.5 * 2^-200 is 0 in float32.
    """
    p = nn.Parameter(torch.ones(33))
    optimizer = IVON([p], 0.0, 10.0, 0.5, beta2=beta2, weight_decay=weight_decay, seed=SEED, backend=backend)
    for step in range(200):
        hess = optimizer.state[p]["hess"].double()
        precision = hess + weight_decay
        estimate = hess - precision / (1 - beta2)
        optimizer.train()
        assert p.isfinite().all(), "the sample"
        p.grad = (estimate / (noise.normals(33, seed=SEED, step=step) * (10.0 * precision).sqrt())).float()
        optimizer.step()
        assert (optimizer.state[p]["hess"] + weight_decay > 0).all()
    assert (optimizer.state[p]["hess"] + weight_decay < 0.01 * (0.5 + weight_decay)).all(), "the gradients are bad"


class CallOrders(RuleBasedStateMachine):
    """Any order of calls, made to two optimizers, one by contexts and one by modes, and to the equations in float64."""

    backend = "reference"

    @initialize(
        shapes=st.lists(st.tuples(st.integers(0, 9)), min_size=1, max_size=3),
        dtype=dtypes,
        approx=st.sampled_from(["price", "gradsq"]),
        other=st.fixed_dictionaries({"beta1": st.sampled_from([0.0, 0.9]), "debias": st.booleans()}),
    )
    def start(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, approx: str, other: dict[str, Any]) -> None:
        options = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.9, "weight_decay": 0.01, "hess_approx": approx}
        self.left, self.right = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=dtype)
        self.contexts, self.modes = (
            IVON([{"params": p[:1]}, {"params": p[1:], **other}], seed=SEED, backend=self.backend, **options)
            for p in (self.left, self.right)
        )
        groups = [self.contexts.param_groups[min(i, 1)] for i in range(len(shapes))]
        self.equations = [Equations(p, group) for p, group in zip(self.left, groups, strict=True)]
        self.gradients: list[list[Tensor]] = []  # of the samples drawn since the last step
        self.steps = 0
        self.key = 0
        self.exact = dtype == torch.float32

    def eps(self, sample: int) -> list[Tensor]:
        return [
            noise.normals(p.numel(), seed=SEED, step=self.steps, sample=sample, param=i)
            for i, p in enumerate(self.left)
        ]

    @rule(zero=st.sampled_from(["before", "inside", "never"]), twice=st.booleans())
    def sample(self, zero: str, twice: bool) -> None:
        """One more MC sample: in a block here, in modes there."""
        if self.gradients:
            self.modes.next_sample()
        if zero == "before" or not self.gradients:
            self.contexts.zero_grad()
            self.modes.zero_grad()
        self.modes.train()
        with self.contexts.sampled_params(train=True):
            if zero == "inside":
                self.contexts.zero_grad()
                self.modes.zero_grad()
            assert torch.equal(flat(self.left), flat(self.right))
            eps = self.eps(len(self.gradients))
            for p, equations, e in zip(self.left, self.equations, eps, strict=True):
                theta = equations.mean + equations.sigma() * e
                torch.testing.assert_close(p.detach().double(), theta, rtol=1e-2, atol=1e-2)
            total = [torch.zeros(p.shape, dtype=torch.float64) for p in self.left]
            for _ in range(2 if twice else 1):
                self.key += 1
                backward(self.left, self.key)
                backward(self.right, self.key)
                total = [t + gradient(p, (self.key, i)) for i, (t, p) in enumerate(zip(total, self.left, strict=True))]
        self.gradients.append(total)

    @rule()
    def raising_block(self) -> None:
        before = flat(self.left)
        with pytest.raises(KeyError), self.contexts.sampled_params(train=True):
            raise KeyError
        assert torch.equal(flat(self.left), before)

    @rule(index=st.one_of(st.none(), st.integers(0, 2**16 - 1)))
    def evaluate(self, index: int | None) -> None:
        for optimizer, params in ((self.contexts, self.left), (self.modes, self.right)):
            before = flat(params)
            with optimizer.sampled_params(sample=index):
                pass
            assert torch.equal(flat(params), before)

    @rule()
    def look_at_the_mean(self) -> None:
        self.modes.eval()

    @precondition(lambda self: self.gradients)
    @rule()
    def look_at_the_sample_again(self) -> None:
        self.modes.train()

    @rule()
    def forget(self) -> None:
        self.contexts.discard_samples()
        self.modes.discard_samples()
        self.gradients = []

    @rule()
    def step(self) -> None:
        if not self.gradients:
            before = snapshot(self.contexts)
            for optimizer in (self.contexts, self.modes):
                with pytest.raises(RuntimeError):
                    optimizer.step()
            assert_same(before, snapshot(self.contexts))
            return
        self.contexts.step()
        self.modes.step()
        eps = [self.eps(sample) for sample in range(len(self.gradients))]
        for i, equations in enumerate(self.equations):
            equations.update([g[i] for g in self.gradients], [e[i] for e in eps])
        self.gradients = []
        self.steps += 1

    @precondition(lambda self: not self.gradients)
    @rule(value=st.sampled_from([-1.0, 0.5, 2.0]))
    def edit(self, value: float) -> None:
        self.modes.eval()
        with torch.no_grad():
            for params in (self.left, self.right):
                params[-1].fill_(value)
        # A step with nothing drawn takes no notice; the next sample does.
        self.equations[-1].mean.fill_(value)

    @rule(which=st.sampled_from(["contexts", "modes"]))
    def resume(self, which: str) -> None:
        """Saving and loading forgets the unfinished step, and nothing else."""
        self.forget()
        optimizer = getattr(self, which)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    @invariant()
    def the_mean_is_kept(self) -> None:
        if not hasattr(self, "left"):
            return
        for p, equations in zip(self.left, self.equations, strict=True):
            if p.numel() == 0:
                continue
            assert relative_error(p, equations.mean) < (1e-4 if self.exact else 2e-2)
            hess = self.contexts.state[p]["hess"]
            assert ((hess + equations.group["weight_decay"]) > 0).all()
            if self.exact:
                assert relative_error(hess, equations.hess) < 1e-3
        left, right = snapshot(self.contexts), snapshot(self.modes)
        drop = [key for key in left if key.endswith(("param", "mean"))]
        same = {key: value for key, value in left.items() if key not in drop}
        assert_same(same, {key: right[key] for key in same})
        for p, q in zip(self.left, self.right, strict=True):
            if not self.gradients:
                assert torch.equal(p, q)


@pytest.mark.slow
def test_any_order_of_calls(backend: str) -> None:
    class Machine(CallOrders):
        pass

    Machine.backend = backend
    run_state_machine_as_test(Machine, settings=settings(stateful_step_count=25))
