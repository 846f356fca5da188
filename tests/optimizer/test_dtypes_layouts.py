"""Every dtype, layout and size gives the same numbers, in the parameter's own storage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from tests.support.helpers import assert_same, bowl, flat, parameters, sample_of, slow_but, snapshot, train, train_modes

pytestmark = pytest.mark.usefixtures("known_normals")

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 3, 4, 5, 15, 16, 17, 1023, 1024, 1025]

# How a tensor with given values can lie in memory; NaN fills what does not belong to it.
Layout = Callable[[Tensor], Tensor]


def sliced(t: Tensor) -> Tensor:
    """A part of a larger tensor: neither the start of its storage nor dense."""
    big = t.new_full([n + 2 for n in t.shape], float("nan"))
    view = big[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


def strided(t: Tensor) -> Tensor:
    """Every third element of the last dimension."""
    big = t.new_full([*t.shape[:-1], 3 * t.shape[-1]], float("nan"))
    return big[..., 1::3].copy_(t)


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": sliced,
    "strided": strided,
}
SHAPE = (4, 3, 5, 2)


def placed(values: Tensor, layout: str) -> nn.Parameter:
    with torch.no_grad():
        result = nn.Parameter(LAYOUTS[layout](values))
    assert torch.equal(result, values)
    return result


def train_with_gradient_layout(optimizer: IVON, p: nn.Parameter, layout: str, steps: int = 3, samples: int = 1) -> None:
    for step in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                grad = torch.autograd.grad(bowl([p.contiguous()], step), p)[0]
                p.grad = LAYOUTS[layout](grad)
        optimizer.step()


@functools.cache
def contiguous_training(backend: str, dtype: torch.dtype, samples: int) -> dict[str, Tensor]:
    p = placed(parameters(SHAPE, dtype=dtype)[0].detach(), "contiguous")
    optimizer = IVON([p], backend=backend, **OPTIONS, mc_samples=samples)
    train_with_gradient_layout(optimizer, p, "contiguous", samples=samples)
    return snapshot(optimizer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", slow_but(LAYOUTS, "contiguous", "strided"))
@pytest.mark.parametrize("parameter", LAYOUTS)
@pytest.mark.parametrize("samples", [1, 2])
def test_layouts_give_the_same_bits(
    backend: str, parameter: str, gradient: str, dtype: torch.dtype, samples: int
) -> None:
    """Noise belongs to the logical element, so that a channels_last model trains as the contiguous one."""
    values = parameters(SHAPE, dtype=dtype)[0].detach()
    p = placed(values, parameter)
    before = (p.data_ptr(), p.stride(), p.storage_offset(), p.untyped_storage().data_ptr())
    surroundings = p.untyped_storage().nbytes() // p.element_size() - p.numel()
    optimizer = IVON([p], backend=backend, **OPTIONS, mc_samples=samples)
    train_with_gradient_layout(optimizer, p, gradient, samples=samples)
    assert (p.data_ptr(), p.stride(), p.storage_offset(), p.untyped_storage().data_ptr()) == before
    whole = torch.empty(0, dtype=dtype).set_(p.untyped_storage())  # type: ignore[call-overload]
    assert int(whole.isnan().sum()) == surroundings, "nothing beside the parameter was written"
    assert_same(contiguous_training(backend, dtype, samples), snapshot(optimizer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loop", [train, train_modes])
def test_sizes(backend: str, dtype: torch.dtype, loop: Any) -> None:
    """One optimizer over all sizes equals the public noise, whatever the neighbours; the arena has no overlap."""
    params = parameters(*SIZES, dtype=dtype)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    loop(optimizer, params, 2)
    expected = sample_of(optimizer, step=2)
    optimizer.train()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)
    optimizer.eval()
    for p in params:
        assert torch.equal(p, optimizer.state[p]["mean"].to(dtype))
        assert optimizer.state[p]["hess"].shape == p.shape


@pytest.mark.on_triton
def test_scalar_parameters(backend: str) -> None:
    p = nn.Parameter(torch.tensor(2.0))
    optimizer = IVON([p], backend=backend, **OPTIONS)
    train(optimizer, [p], 3)
    assert p.shape == () and optimizer.state[p]["mean"].shape == () and p.item() != 2.0


@pytest.mark.on_triton
def test_poisoned_state_is_never_read_outside_its_view(backend: str) -> None:
    """NaN in what lies between the parameters' parts of the arena must not reach any of them."""
    params = parameters(*SIZES)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    for p in params:
        for key in ("mean", "momentum", "hess"):
            view = optimizer.state[p][key]
            whole = torch.empty(0).set_(view.untyped_storage())  # type: ignore[call-overload]
            covered = torch.zeros(whole.numel(), dtype=torch.bool)
            for q in params:
                other = optimizer.state[q][key]
                if other.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                    covered[other.storage_offset() : other.storage_offset() + other.numel()] = True
            whole[~covered] = float("nan")
    train(optimizer, params, 2)
    assert all(value.isfinite().all() for value in snapshot(optimizer).values())


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_the_parameter(backend: str, dtype: torch.dtype, gradient: torch.dtype) -> None:
    """torch itself refuses every other one."""
    p = parameters(37, dtype=dtype)[0]
    optimizer = IVON([p], backend=backend, **OPTIONS)
    optimizer.train()
    grad = torch.linspace(-1, 1, 37).to(gradient)
    if gradient == dtype:
        p.grad = grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum"], 0.1 * grad.float())
    else:
        with pytest.raises((RuntimeError, TypeError)):
            p.grad = grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_the_rounded_float32_ones(backend: str, dtype: torch.dtype) -> None:
    """Round to nearest even on the way to the weight: the float32 run's state gives exactly these weights."""
    values = torch.linspace(-3, 3, 1000)
    low, high = nn.Parameter(values.to(dtype)), nn.Parameter(values.to(dtype).float())
    optimizers = [IVON([p], backend=backend, **OPTIONS) for p in (low, high)]
    for _ in range(3):
        for optimizer, p in zip(optimizers, (low, high), strict=True):
            optimizer.train()
            p.grad = torch.linspace(-2, 1, 1000).to(p.dtype).to(dtype).to(p.dtype)
        assert torch.equal(low, high.to(dtype)), "the sample"
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(low, high.to(dtype)), "the mean"
    for key in ("mean", "momentum", "hess"):
        assert torch.equal(optimizers[0].state[low][key], optimizers[1].state[high][key])


def test_float16_extremes(backend: str) -> None:
    """ess * hess beyond float16 and sigma below its normal range."""
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    optimizer = IVON([p], lr=0.1, ess=1e9, hess_init=100.0, backend=backend, seed=0)
    with optimizer.sampled_params(train=True):
        expected = sample_of(optimizer, step=0)[0]
        assert float((p != 0).float().mean()) > 0.9
        torch.testing.assert_close(p.double(), expected, rtol=2**-10, atol=2**-24)
        p.grad = torch.full_like(p, 6e4)
    optimizer.step()
    assert p.isfinite().all()


@pytest.mark.on_triton
def test_mixed_dtypes_train_as_if_alone(backend: str) -> None:
    """Every parameter's numbers are those that it has in an optimizer of its own (with the same noise index)."""
    params = [p for dtype in DTYPES for p in parameters(33, 6, dtype=dtype)]
    optimizer = IVON(params, backend=backend, **OPTIONS)
    train(optimizer, params, 2)
    for i, p in enumerate(params):
        twins = parameters(33, 6, dtype=p.dtype)
        fillers = [nn.Parameter(torch.zeros(1)) for _ in range(i)]
        alone = IVON([*fillers, twins[i % 2]], backend=backend, **OPTIONS)
        for step in range(2):
            with alone.sampled_params(train=True):
                alone.zero_grad()
                bowl([*(p.new_zeros(0) for _ in range(i)), twins[i % 2]], step).backward()
            alone.step()
        assert torch.equal(twins[i % 2], p)


@pytest.mark.on_triton
def test_in_place_writes_bump_the_version_counter(backend: str) -> None:
    """Autograd must notice that a weight saved for backward was changed under it."""
    p = parameters(5)[0]
    optimizer = IVON([p], backend=backend, **OPTIONS)

    def bumped(action: Callable[[], Any]) -> bool:
        before = p._version
        action()
        return p._version > before

    assert bumped(optimizer.train)
    assert bumped(optimizer.eval)
    optimizer.train()
    bowl([p], 0).backward()
    assert bumped(optimizer.step)
    context = optimizer.sampled_params()
    assert bumped(context.__enter__)
    assert bumped(lambda: context.__exit__(None, None, None))


def test_backward_through_a_restored_weight_is_an_error(backend: str) -> None:
    p = parameters(5)[0]
    optimizer = IVON([p], backend=backend, **OPTIONS)
    with optimizer.sampled_params():
        loss = (p * p).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edit", ["all", "one element", "data"])
def test_a_weight_edited_outside_is_the_new_mean(backend: str, dtype: torch.dtype, edit: str) -> None:
    params = parameters(17, 4, dtype=dtype)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    train(optimizer, params, 2)
    means = [optimizer.state[p]["mean"].clone() for p in params]
    with torch.no_grad():
        if edit == "all":
            params[0].fill_(2.5)
        elif edit == "one element":
            params[0][3] = 2.5
        else:
            params[0].data[3] = 2.5
    edited = flat(params)
    with optimizer.sampled_params(train=True):
        bowl(params, 2).backward()
    assert torch.equal(flat(params), edited)
    now = [optimizer.state[p]["mean"] for p in params]
    assert float(now[0][3]) == 2.5 and torch.equal(now[1], means[1])
    if edit != "all":
        assert torch.equal(torch.cat([now[0][:3], now[0][4:]]), torch.cat([means[0][:3], means[0][4:]])), "not rounded"
    optimizer.step()
    assert abs(float(params[0][3].detach()) - 2.5) < 0.5


@pytest.mark.on_triton
@pytest.mark.parametrize("when", ["before evaluation", "between sample and step", "in modes", "before saving"])
def test_an_edit_is_not_lost_at_other_moments(backend: str, when: str) -> None:
    params = parameters(17)
    optimizer = IVON(params, backend=backend, **OPTIONS)

    def edit() -> None:
        with torch.no_grad():
            params[0].copy_(torch.full((17,), 2.5))

    if when == "before evaluation":
        edit()
        with optimizer.sampled_params():
            assert (params[0] - 2.5).abs().max() < 1.0
        assert torch.equal(flat(params), torch.full((17,), 2.5))
    elif when == "between sample and step":
        with optimizer.sampled_params(train=True):
            bowl(params, 0).backward()
        edit()
        optimizer.step()
        assert (params[0] - 2.5).abs().max() < 0.5
    elif when == "before saving":
        edit()
        assert torch.equal(optimizer.state_dict()["state"][0]["mean"], torch.full((17,), 2.5))
    else:
        optimizer.train()
        optimizer.eval()
        edit()
        optimizer.train()
        assert (params[0] - 2.5).abs().max() < 1.0
        optimizer.eval()
        assert torch.equal(flat(params), torch.full((17,), 2.5))


def test_tied_parameters_are_one(backend: str) -> None:
    p = parameters(5)[0]
    with pytest.raises(ValueError, match=r"more than one|duplicate"):
        IVON([{"params": [p]}, {"params": [p]}], backend=backend, **OPTIONS)


def test_tensors_that_require_no_module(backend: str) -> None:
    """Plain leaf tensors are parameters too."""
    p = torch.ones(5, requires_grad=True)
    optimizer = IVON([p], backend=backend, **OPTIONS)
    train(optimizer, [p], 2)
    assert not torch.equal(p, torch.ones(5))


def test_non_leaf_tensors_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        IVON([torch.ones(5, requires_grad=True) * 2], backend=backend, **OPTIONS)


def test_overlapping_storage_is_refused(backend: str) -> None:
    """An expanded tensor has several elements in one place: no in-place optimizer can write it."""
    with pytest.raises(ValueError, match="share memory"):
        IVON([nn.Parameter(torch.ones(1, 3).expand(4, 3))], backend=backend, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_unsupported_dtypes_are_refused(backend: str, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    trained = nn.Parameter(torch.ones(3))
    optimizer = IVON([trained, parameter], backend=backend, **OPTIONS)  # frozen: left alone
    parameter.requires_grad_()
    with pytest.raises(TypeError, match="float8"):
        optimizer.train()
    with pytest.raises(TypeError, match="float8"):
        IVON([parameter], backend=backend, **OPTIONS)


def test_meta_parameters_are_refused(backend: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match="meta"):
        IVON([nn.Parameter(torch.ones(3, device="meta"))], backend=backend, **OPTIONS)
