"""On a GPU: nothing waits for the device, devices change, and the bits are those of the reference on the CPU.

The kernels' own tests, tests/test_cuda_*.py and tests/kernels/test_backend_matrix.py, run there too.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, NonFiniteGradientError, backends, noise
from ivon_kernels.backends.triton_launch import interpreted
from tests.support import gpu_training
from tests.support.gpu_training import (
    OPTIONS,
    assert_equal,
    everything,
    fresh,
    loss,
    on_cpu,
    reference,
    shift_of,
    train,
    weights,
)
from tests.support.matrix import GPU_TARGETS, Target

pytestmark = [
    pytest.mark.gpu,
    # torch says so once, whenever the mode is set.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]
SCALE = 2.0**16  # powers of two scale exactly: the bits are those of the unscaled run


@pytest.fixture(params=GPU_TARGETS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    target: Target = request.param
    with target.in_use():
        yield target.backend


@pytest.fixture
def only_backend(backend: str) -> Iterator[str]:
    """The backend, which ``backend=None`` takes on a GPU because the other one is not there."""
    (other,) = {"cuda", "triton"} - {backend}
    with backends.override(other, None):
        yield backend


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Errors where torch would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy() -> None:
    """The device does nothing else for about a tenth of a second, while the host goes on."""
    torch.cuda._sleep(200_000_000)


# ---- the host never waits -------------------------------------------------------------------------------------------

Loop = Callable[[IVON, list[nn.Parameter], int], None]


def modes(optimizer: IVON, params: list[nn.Parameter], steps: int) -> None:
    train(optimizer, params, steps)


def three_samples(optimizer: IVON, params: list[nn.Parameter], steps: int) -> None:
    train(optimizer, params, steps, samples=3)


def context(optimizer: IVON, params: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss(params, shift_of(step)).backward()
        optimizer.step()


def unused_parameters(optimizer: IVON, params: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        optimizer.train()
        optimizer.zero_grad()
        loss(params[step % 2 :], shift_of(step)).backward()
        optimizer.step()


def scheduled(optimizer: IVON, params: list[nn.Parameter], steps: int) -> None:
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, steps)
    for step in range(steps):
        train(optimizer, params, 1, start=step)
        schedule.step()


def clipped(optimizer: IVON, params: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        optimizer.train()
        optimizer.zero_grad()
        loss(params, shift_of(step)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1e9)
        optimizer.step()


LOOPS: tuple[Loop, ...] = (modes, three_samples, context, unused_parameters, scheduled, clipped)


@pytest.mark.parametrize("options", [{}, {"sample_in_step": True}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("loop", LOOPS)
def test_training_never_waits_for_the_device(backend: str, loop: Loop, options: dict[str, Any]) -> None:
    optimizer, params = fresh(backend, **options)
    loop(optimizer, params, 4)
    with no_synchronization():
        loop(optimizer, params, 4)
    expected, others = reference(**options)
    for _ in range(2):
        loop(expected, others, 4)
    assert_equal(optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_capturable_loop_never_waits_either(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = fresh(backend, dtype=dtype, capturable=True)
    train(optimizer, params, 3)
    with no_synchronization():
        train(optimizer, params, 3, start=3)
    expected, others = reference(dtype)
    train(expected, others, 6)
    assert_equal(optimizer, expected)


def scaled_training(
    optimizer: IVON, params: list[nn.Parameter], scaler: Any, steps: int, start: int = 0, factor: float = 1.0
) -> None:
    for step in range(start, start + steps):
        optimizer.train()
        optimizer.zero_grad()
        scaler.scale(loss(params, shift_of(step)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_training_with_a_scaler_never_waits(backend: str, hess_approx: str) -> None:
    optimizer, params = fresh(backend, hess_approx=hess_approx)
    scaler = torch.amp.GradScaler(gpu_training.DEVICE.type, init_scale=SCALE, growth_interval=3)
    scaled_training(optimizer, params, scaler, 4)
    with no_synchronization():
        scaled_training(optimizer, params, scaler, 4, start=4)
    assert scaler.get_scale() == 4 * SCALE
    expected, others = reference(hess_approx=hess_approx)
    train(expected, others, 8)
    assert_equal(optimizer, expected)


@pytest.mark.parametrize("in_step", [False, True], ids=["train and step", "sample_in_step"])
def test_an_overflow_skips_and_redraws_nothing(backend: str, in_step: bool) -> None:
    optimizer, params = fresh(backend, sample_in_step=in_step)
    scaler = torch.amp.GradScaler(gpu_training.DEVICE.type, init_scale=SCALE)
    scaled_training(optimizer, params, scaler, 2)
    optimizer.train()
    drawn = on_cpu(params)
    for _ in range(2):
        scaled_training(optimizer, params, scaler, 1, start=2, factor=float("inf"))
        optimizer.train()
        assert torch.equal(on_cpu(params), drawn)
    assert optimizer.skipped_steps == 2 and scaler.get_scale() == SCALE / 4
    scaled_training(optimizer, params, scaler, 2, start=2)
    expected, others = reference()
    train(expected, others, 4)
    assert_equal(optimizer, expected)


# ---- gradients that are not finite ----------------------------------------------------------------------------------


def bad_step(optimizer: IVON, params: list[nn.Parameter]) -> None:
    """One step with NaN in a gradient, launched while the device is busy and before it could look."""
    optimizer.train()
    optimizer.zero_grad()
    loss(params, shift_of(9)).backward()
    grad = params[1].grad
    assert grad is not None
    grad[2, 3].fill_(float("nan"))
    keep_busy()
    optimizer.step()


@pytest.mark.parametrize("in_step", [False, True], ids=["train and step", "sample_in_step"])
def test_a_bad_gradient_is_reported_at_a_later_step(backend: str, in_step: bool) -> None:
    optimizer, params = fresh(backend, sample_in_step=in_step)
    train(optimizer, params, 3)
    with no_synchronization():
        bad_step(optimizer, params)
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteGradientError, match=r"param_groups\[0\]\['params'\]\[1\] of shape \(33, 5\)"):
        train(optimizer, params, 1, start=3)
    expected, others = reference()
    train(expected, others, 3)
    assert_equal(optimizer, expected)
    for who, its in ((optimizer, params), (expected, others)):
        train(who, its, 2, start=3)
    assert_equal(optimizer, expected)
    assert optimizer.skipped_steps == 0


def test_bad_gradients_may_be_skipped_and_counted(backend: str) -> None:
    optimizer, params = fresh(backend, nonfinite="skip")
    train(optimizer, params, 3)
    with no_synchronization():
        bad_step(optimizer, params)
        bad_step(optimizer, params)
    assert optimizer.skipped_steps == 2
    train(optimizer, params, 2, start=3)
    expected, others = reference()
    train(expected, others, 5)
    assert_equal(optimizer, expected)


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_sample", [False, True], ids=["between steps", "before backward"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_may_move_there_and_back(only_backend: str, steps: int, in_sample: bool) -> None:
    cpu = torch.device("cpu")
    optimizer, params = fresh(None, cpu)
    model = nn.ParameterList(params)
    train(optimizer, params, steps)
    for number, device in enumerate((gpu_training.DEVICE, cpu, gpu_training.DEVICE)):
        if in_sample:
            optimizer.train()
        model.to(device)
        assert all(a is b for a, b in zip(model, params, strict=True))
        train(optimizer, params, 2, start=steps + 2 * number)
        if device.type == "cuda":
            assert set(optimizer.backends.values()) == {only_backend}
    expected, others = reference()
    train(expected, others, steps + 6)
    assert_equal(optimizer, expected)


@pytest.mark.parametrize("capturable", [False, True])
def test_state_dicts_go_across_devices(backend: str, capturable: bool) -> None:
    one, params = fresh(backend, capturable=capturable)
    train(one, params, 2)
    two, others = reference(seed=3)
    two.load_state_dict(one.state_dict())
    train(two, others, 2, start=2)
    three, theirs = fresh(backend, capturable=capturable, seed=4)
    train(three, theirs, 1)
    three.load_state_dict(two.state_dict())
    for who, its in ((one, params), (two, others), (three, theirs)):
        train(who, its, 4 if who is one else 2, start=2 if who is one else 4)
        assert_equal(who, one)
    assert all(p.device == gpu_training.DEVICE for p in theirs)
    assert all(three.state[p]["mean"].device == gpu_training.DEVICE for p in theirs)


def test_the_cpu_and_a_gpu_train_together(only_backend: str) -> None:
    params = [nn.Parameter(w.to(gpu_training.DEVICE) if i % 2 else w) for i, w in enumerate(weights())]
    optimizer = IVON(params, **OPTIONS)
    expected = IVON([nn.Parameter(w) for w in weights()], backend="reference", **OPTIONS)
    for who in (optimizer, expected):
        its = who.param_groups[0]["params"]
        for step in range(3):
            who.train()
            who.zero_grad()
            for p in its:
                loss([p], shift_of(step)).backward()
            who.step()
    assert_equal(optimizer, expected)
    with pytest.raises(ValueError, match=r"parameter group 0 on one device"):
        IVON(params, capturable=True, **OPTIONS)
    capturable = IVON([nn.Parameter(weights()[0])], capturable=True, **OPTIONS)
    with pytest.raises(ValueError, match=r"parameter group 1 on one device"):
        capturable.add_param_group({"params": params})
    assert len(capturable.param_groups) == 1


def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    second = torch.device("cuda", 1)
    optimizer, params = fresh(backend, second, capturable=True)
    train(optimizer, params, 4, samples=2)
    assert torch.cuda.current_device() == 0 and optimizer.state[params[0]]["mean"].device == second
    expected, others = reference()
    train(expected, others, 4, samples=2)
    assert_equal(optimizer, expected)


def test_another_stream(backend: str) -> None:
    """Whose work is late: what ran on another stream would be too early."""
    optimizer, params = fresh(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(4):
            torch.cuda._sleep(5_000_000)
            train(optimizer, params, 1, start=step, samples=2)
    torch.cuda.current_stream().wait_stream(stream)
    expected, others = reference()
    train(expected, others, 4, samples=2)
    assert_equal(optimizer, expected)


# ---- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Inductor's own: about TF32, deprecations, .grad of tensors that are no leaves
def test_a_compiled_training_step(backend: str) -> None:
    """By Inductor, with a schedule and step counts that change, and without recompiling anything."""
    if interpreted():
        pytest.skip("TRITON_INTERPRET is set, under which Inductor's kernels do not run on a GPU")
    torch._dynamo.reset()
    optimizer, params = fresh(backend)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6)
    shift = torch.zeros((), device=gpu_training.DEVICE)

    def step() -> Tensor:
        optimizer.train()
        value = loss(params, shift)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    run = torch.compile(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(6):
            shift.fill_(shift_of(number))
            run()
            schedule.step()
    expected, others = reference()
    schedule = torch.optim.lr_scheduler.LinearLR(expected, 0.1, 1.0, 6)
    for number in range(6):
        train(expected, others, 1, start=number)
        schedule.step()
    assert_equal(optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(backend: str, dtype: torch.dtype) -> None:
    """Mean, momentum and Hessian: 12 bytes for an element, and small tables."""
    count = 2**23
    params = [nn.Parameter(torch.zeros(count, dtype=dtype, device=gpu_training.DEVICE)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    gc.collect()  # nothing else is freed below
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer = IVON(params, backend=backend, **OPTIONS)
    for _ in range(3):
        optimizer.train()
        optimizer.step()
    state = 12 * len(params) * count
    assert state <= torch.cuda.max_memory_allocated() - before <= state + 2**20


def test_evaluation_samples_are_the_cpus(backend: str) -> None:
    optimizer, params = fresh(backend)
    train(optimizer, params, 2)
    expected, others = reference()
    train(expected, others, 2)
    for sample in (0, 7, 2**16 - 1, None):
        with optimizer.sampled_params(sample=sample), expected.sampled_params(sample=sample):
            assert torch.equal(on_cpu(params), on_cpu(others))
    assert_equal(optimizer, everything(expected))


def test_a_million_normals(backend: str) -> None:
    """With mean 0 and sigma 1 the sample is the noise."""
    count = 2**20 + 3
    seed = 2**63 + 5
    param = nn.Parameter(torch.zeros(count, device=gpu_training.DEVICE))
    optimizer = IVON([param], lr=0.0, ess=1.0, hess_init=1.0, weight_decay=0.0, seed=seed, backend=backend)
    optimizer.train()
    assert torch.equal(param.detach().cpu(), noise.normals(count, seed=seed, step=0))
    with optimizer.sampled_params(sample=65535):
        expected = noise.normals(count, seed=seed, step=noise.EVAL_STEP, sample=65535)
        assert torch.equal(param.detach().cpu(), expected)
