"""Training whose gradients have the same bits on every device, for the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_kernels import IVON

DEVICE = torch.device("cuda", 0)
SHAPES = ((4100,), (33, 5), (7,), (0,))
OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 77}


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def fresh(
    backend: str | None, device: torch.device | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[IVON, list[nn.Parameter]]:
    """Two groups on one device (the GPU)."""
    params = [nn.Parameter(w.to(DEVICE if device is None else device)) for w in weights(dtype)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03, "beta1": 0.8}]
    return IVON(groups, backend=backend, **{**OPTIONS, **options}), params


def reference(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    """The same on the CPU, by the defining equations."""
    return fresh("reference", torch.device("cpu"), dtype, **options)


def shift_of(step: int) -> float:
    """Where the loss has its minimum; 16 bits hold it exactly."""
    return 0.125 * step


def loss(params: Sequence[Tensor], shift: float | Tensor) -> Tensor:
    """Its gradient is ``p - shift``, rounded once, however it is computed: halves and their sum are exact."""
    return torch.stack([(0.5 * (p - shift) * (p - shift)).sum().float() for p in params]).sum()


def train(optimizer: IVON, params: Sequence[Tensor], steps: int, *, start: int = 0, samples: int = 1) -> None:
    for step in range(start, start + steps):
        for sample in range(samples):
            if sample:
                optimizer.next_sample()
            optimizer.train()
            optimizer.zero_grad()
            loss(params, shift_of(step)).backward()
        optimizer.step()


def on_cpu(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, in one tensor on the CPU."""
    return torch.cat([t.detach().cpu().float().flatten() for t in tensors])


def everything(optimizer: IVON) -> list[Tensor]:
    """Parameters and state on the CPU, with the mean in the weights."""
    optimizer.eval()
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            result += [t.detach().cpu().clone() for t in (p, *(state[k] for k in ("step", "mean", "momentum", "hess")))]
    return result


def assert_equal(left: IVON | list[Tensor], right: IVON | list[Tensor]) -> None:
    """Bit for bit, on whatever devices they are."""
    pairs = zip(*(everything(side) if isinstance(side, IVON) else side for side in (left, right)), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
