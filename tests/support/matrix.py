"""The training that every backend repeats with the bits of the reference, and the targets that repeat it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, available_backends, backends
from ivon_kernels.backends.triton_launch import installed, interpreted
from tests.support.cuda_emulator import emulated, moved
from tests.support.ptx.cuda import ptx_cuda
from tests.support.ptx.triton import Device, ptx_triton

DTYPES = {
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "mixed": (torch.float32, torch.bfloat16, torch.float16),  # a kernel for each
}
LAYOUTS = ("contiguous", "channels_last", "strided")
SAMPLES = (1, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradsq": {"hess_approx": "gradsq"},
    "clipped": {"clip_radius": 0.05, "rescale_lr": False, "antithetic": True},
    "no debias": {"debias": False, "weight_decay": 0.0},
    "one pass": {"sample_in_step": True},
}


@dataclass(frozen=True)
class Case:
    dtype: str = "float32"
    layout: str = "contiguous"
    samples: int = 1
    variant: str = "plain"

    def __str__(self) -> str:
        return f"{self.dtype}-{self.layout}-{self.samples}-{self.variant}"


@dataclass(frozen=True)
class Target:
    """A backend, and where its tensors are. On the CPU ``cuda`` is its emulator and ``triton`` is interpreted, or both
    are the PTX that the compilers make for a GPU."""

    backend: str
    device: str
    small: bool = False  # too slow for thousands of elements and many steps
    gpu: str = ""  # whose PTX is executed on the CPU
    seed: int | None = None  # of the order of its warps and blocks

    def __str__(self) -> str:
        if self.gpu:
            shuffled = "" if self.seed is None else f" shuffled {self.seed}"
            return f"{self.backend} ptx {self.gpu}{shuffled}@{self.device}"
        how = {"cuda": " emulated", "triton": " interpreted"}.get(self.backend, "") if self.device == "cpu" else ""
        return f"{self.backend}{how}@{self.device}"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The backend of this name is the one that is meant; skips the test if it cannot be had."""
        if self.device == "cuda":
            if self.backend == "triton" and interpreted():
                pytest.skip("TRITON_INTERPRET is set")
            if not torch.cuda.is_available():
                pytest.skip("there is no GPU")
        elif self.backend == "triton" and not interpreted():
            pytest.skip("TRITON_INTERPRET is off")
        with self._executed() if self.gpu else emulated(self.backend) if self.device == "cpu" else nullcontext():
            if reason := available_backends()[self.backend]:
                pytest.skip(f"backend {self.backend}: {reason}")
            yield

    @contextlib.contextmanager
    def _executed(self) -> Iterator[None]:
        """The backend's PTX in the place of a GPU."""
        if self.backend == "cuda":
            with backends.override("cuda", ptx_cuda(self.gpu, self.seed)):
                yield
        elif not installed():
            pytest.skip("triton is not installed")
        else:
            with ptx_triton(Device(self.gpu, self.seed)) as backend, backends.override("triton", backend):
                yield


CPU = Target("cpu", "cpu")
EMULATED = Target("cuda", "cpu")
INTERPRETED = Target("triton", "cpu", small=True)
PTX = tuple(Target(backend, "cpu", small=True, gpu="sm_90") for backend in ("triton", "cuda"))
OTHER_PTX = tuple(Target(backend, "cpu", small=True, gpu="sm_80", seed=1) for backend in ("triton", "cuda"))
GPU_TARGETS = (Target("cuda", "cuda"), Target("triton", "cuda"))


def model(dtype: str, layout: str, small: bool = False) -> list[nn.Parameter]:
    """Parameters on the CPU: tails of every length, more elements than a block has, and the strides asked for."""
    generator = torch.Generator().manual_seed(3)
    dtypes = DTYPES[dtype]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = [randn(size) for size in (0, 1, 5, 33, 133 if small else 2053)]
    image = randn(2, 3, 5, 7)
    tensors.append(image.to(memory_format=torch.channels_last) if layout == "channels_last" else image)
    if layout == "strided":  # columns of a wider tensor, a transposed one, unaligned ones
        rows, columns = (11, 16) if small else (129, 40)
        tensors += [randn(rows, columns)[:, 1 : columns - 2 : 3], randn(rows, columns).t()]
        tensors += [randn(101 if small else 1001)[1:], randn(2, 3, 2, 4).to(memory_format=torch.channels_last)]
    result = []
    for i, tensor in enumerate(tensors):
        storage = torch.zeros(tensor.untyped_storage().nbytes() // 4, dtype=dtypes[i % len(dtypes)])
        cast = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())  # `to` closes gaps
        result.append(nn.Parameter(cast.copy_(tensor)))
    return result


def gradient(param: Tensor, step: int, number: int) -> Tensor:
    """Of a weight on the CPU: depends on the weight, and lies in memory in another way every few parameters."""
    grad = param * 0.7 + 0.01 * (step + number)
    if grad.dim() == 2:
        return grad.t().contiguous().t()
    if grad.dim() == 1 and number % 2:  # unaligned
        return torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].copy_(grad)
    return grad


def train(backend: str, case: Case, *, device: str = "cpu", small: bool = False) -> list[Tensor]:
    """Some steps with gradients that depend on the weights; returns every tensor of parameters and state.

    Gradients are computed on the CPU for every device: what is compared is the optimizer alone.
    """
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    params = model(case.dtype, case.layout, small)
    assert case.layout == "contiguous" or not all(p.is_contiguous() for p in params)
    params = [nn.Parameter(moved(p.detach(), where)) for p in params]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.02, "ess": 50.0, "beta2": 0.9}]
    options = VARIANTS[case.variant]
    optimizer = IVON(groups, lr=0.1, ess=200.0, hess_init=0.5, beta2=0.95, seed=13, backend=backend, **options)
    for step in range(3 if small else 6):
        for sample in range(case.samples):
            if sample:
                optimizer.next_sample()
            optimizer.train()
            for i, p in enumerate(params):
                unused = i == 3 and step == 2 and sample == case.samples - 1
                p.grad = None if unused else moved(gradient(p.detach().cpu(), step, i), where)
        optimizer.step()
    optimizer.eval()
    result = [p.detach() for p in params]
    for p in params:
        result += [optimizer.state[p][key] for key in ("step", "mean", "momentum", "hess")]
    return [tensor.cpu() for tensor in result]


@functools.cache
def reference(case: Case, small: bool) -> list[Tensor]:
    """What every target must give."""
    return train("reference", case, small=small)


def assert_has_the_bits_of_the_reference(target: Target, case: Case) -> None:
    actual = train(target.backend, case, device=target.device, small=target.small)
    for left, right in zip(actual, reference(case, target.small), strict=True):
        assert torch.isfinite(left).all()
        assert torch.equal(left, right)
