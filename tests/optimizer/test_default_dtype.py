"""``torch.set_default_dtype`` decides about tensors that do not say what they are: none of ours may be such a one."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ivon_kernels
from ivon_kernels import IVON
from tests.support.helpers import OPTIONS, flat, snapshot, train

FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}
DTYPES = (torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def _trained(backend: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    shapes = ((33, 3), (5,))
    options = {"dtype": torch.float32, "device": "cpu"}
    gradients = [torch.linspace(-1.0, 1.0, math.prod(s), **options).view(s).to(dtype) for s in shapes]
    params = [nn.Parameter(gradient + 0.5) for gradient in gradients]

    def loss(params: list[Tensor], step: int) -> Tensor:  # no default dtype within
        return torch.stack([(p * g).sum().float() for p, g in zip(params, gradients, strict=True)]).sum()

    optimizer = IVON(params, backend=backend, seed=1, **OPTIONS)
    means = train(optimizer, params, 3, loss=loss) + train(optimizer, params, 2, samples=2, loss=loss)
    with optimizer.sampled_params():
        means.append(flat(params))
    return snapshot(optimizer), means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_has_the_bits_of_training_under_float32(
    backend: str, dtype: torch.dtype, default_dtype: torch.dtype
) -> None:
    state, means = _trained(backend, dtype)
    torch.set_default_dtype(default_dtype)
    other_state, other_means = _trained(backend, dtype)
    for key, value in state.items():
        assert other_state[key].dtype == value.dtype and torch.equal(other_state[key], value), key
    assert all(torch.equal(a, b) for a, b in zip(means, other_means, strict=True))


def test_training_has_its_bits_under_another_default_device(backend: str) -> None:
    """Scripts call torch.set_default_device("cuda") and have parameters elsewhere; what is on "meta" has no values."""
    state, means = _trained(backend, torch.float32)
    with torch.device("meta"):
        other_state, other_means = _trained(backend, torch.float32)
    for key, value in state.items():
        assert torch.equal(other_state[key], value), key
    assert all(torch.equal(a, b) for a, b in zip(means, other_means, strict=True))


def test_the_package_allocates_nothing_without_a_dtype_and_a_device() -> None:
    found = []
    for path in Path(inspect.getfile(ivon_kernels)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if (
                of_torch
                and node.func.attr in FACTORIES
                and not {"dtype", "device"} <= {word.arg for word in node.keywords}
            ):
                found.append(f"{path.name}:{node.lineno}: torch.{node.func.attr}")
    assert not found
