"""Posteriors of small models, and how well stacked samples agree with separate passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_kernels import lora
from ivon_kernels.gaussians.names import weight_names
from ivon_kernels.posterior import Gaussian, Posterior

Run = Callable[[nn.Module, Any], Tensor]

# Passes with another number of rows sum in another order. The sums of these models have at most 16 float32 products,
# whose magnitudes add up to less than 10: an order changes them by less than 2 * 16 * 2^-24 * 10 = 2e-5, in each of two
# layers.
ROUNDING = 4e-5


def posterior_of(model: nn.Module, *, adapter: str | None = None, spread: float = 0.2, seed: int = 11) -> Posterior:
    """A posterior over all parameters that require a gradient, around random means, which the model gets.

    Args:
        model: Changed.
        adapter: As for `Posterior`.
        spread: Typical sigma.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussians = {}
    for name, param in weight_names(model, adapter).items():
        if param.requires_grad:
            shift = 0.3 * torch.randn(param.shape, generator=generator)
            with torch.no_grad():
                param.add_(shift.to(param.dtype))
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            hess = (torch.rand(param.shape, generator=generator) + 0.5).to(dtype)
            index = 3 + 2 * len(gaussians)
            gaussians[name] = Gaussian(param.detach().to(dtype).clone(), hess, index, spread**-2, 0.1)
    return Posterior(gaussians, seed)


@torch.no_grad()
def separate(
    model: nn.Module, posterior: Posterior, samples: Sequence[int], run: Run, inputs: Any, adapter: str | None = None
) -> Tensor:
    """One pass for each sample."""
    outputs = []
    for sample in samples:
        with posterior.sampled(model, sample, adapter=adapter):
            outputs.append(run(model, inputs).clone())
    return torch.stack(outputs)


@torch.no_grad()
def stacked(
    model: nn.Module, posterior: Posterior, samples: Sequence[int], run: Run, inputs: Any, **options: Any
) -> Tensor:
    """One pass for all."""
    with lora.stack(model, posterior, samples, **options) as stack:
        output: Tensor = stack.split(run(model, stack.repeat(inputs)))
    return output


@torch.no_grad()
def exact(
    model: nn.Module, posterior: Posterior, samples: Sequence[int], run: Run, inputs: Any, adapter: str | None = None
) -> Tensor:
    """The same in float64, with the bits of the sampled weights."""
    dtypes = {name: param.dtype for name, param in posterior.parameters_of(model, adapter).items()}
    twin = copy.deepcopy(model).double()
    params = posterior.parameters_of(twin, adapter)
    outputs = []
    for sample in samples:
        for name, weight in posterior.draw(sample).items():
            params[name].copy_(weight.to(dtypes[name]))
        outputs.append(run(twin, inputs).clone())
    return torch.stack(outputs)


def rms(tensor: Tensor) -> float:
    """Root of the mean square."""
    return float(tensor.double().square().mean().sqrt())


def assert_as_good(found: Tensor, apart: Tensor, truth: Tensor) -> None:
    """Stacked samples are as near to float64 as separate passes are: at most twice their error, root mean square.

    The two differ in the order of summation alone, so that their errors are of one size; the floor is one rounding of
    the outputs, for results that separate passes happen to get exactly.
    """
    assert found.shape == apart.shape and found.dtype == apart.dtype
    assert rms(truth.std(0)) > 0.01 * rms(truth), "the samples hardly differ: nothing would be shown"
    floor = torch.finfo(found.dtype).eps / 2 * rms(truth)
    assert rms(found - truth) <= 2 * rms(apart - truth) + floor


def check(
    model: nn.Module,
    posterior: Posterior,
    run: Run,
    inputs: Any,
    samples: Sequence[int] = (0, 1, 5),
    adapter: str | None = None,
    *,
    untouched: bool = True,
    **options: Any,
) -> Tensor:
    """Stack, compare with separate passes and float64; nothing may be left behind, nor weights written if `untouched`.

    Returns:
        The stacked output.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = stacked(model, posterior, samples, run, inputs, adapter=adapter, **options)
    assert not untouched or all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    apart = separate(model, posterior, samples, run, inputs, adapter)
    assert_as_good(found, apart, exact(model, posterior, samples, run, inputs, adapter))
    return found
