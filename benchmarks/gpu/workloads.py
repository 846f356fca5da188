"""The tensors that the GPU benchmark walks."""

from __future__ import annotations

import torch

from benchmarks.speed.workloads import WORKLOADS as SPEED_WORKLOADS
from benchmarks.speed.workloads import Workload, flat, lora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Llama-2-7B: 32 layers; q, k, v, o are 4096 x 4096, gate and up 4096 -> 11008, down 11008 -> 4096.
_LAYERS, _WIDTH, _INNER = 32, 4096, 11008
_LINEAR = ((_WIDTH, _WIDTH),) * 4 + ((_WIDTH, _INNER),) * 2 + ((_INNER, _WIDTH),)


def _lora_all(rank: int) -> tuple[tuple[int, ...], ...]:
    """A and B of LoRA on all seven linear layers of every block."""
    layer = tuple(shape for inner, outer in _LINEAR for shape in ((rank, inner), (outer, rank)))
    return layer * _LAYERS


_TINY = {workload.name: workload for workload in SPEED_WORKLOADS if workload.name.endswith("-tiny")}

# In the order in which they are measured: when the time runs out, the last ones are left out.
WORKLOADS = (
    Workload("lora-r8-qv", "Llama-2-7B, LoRA r=8 on q, v", lora(_LAYERS, _WIDTH, _WIDTH, _WIDTH, 8)),
    Workload("lora-r16-all", "Llama-2-7B, LoRA r=16 on all linear layers", _lora_all(16)),
    flat(400_000_000),
    _TINY["128-tiny"],
    Workload("lora-r16-qv", "Llama-2-7B, LoRA r=16 on q, v", lora(_LAYERS, _WIDTH, _WIDTH, _WIDTH, 16)),
    flat(1_000_000_000),
    _TINY["450-tiny"],
)
# The same code on a machine without a GPU: a few tensors, one of them of an odd size.
DRY_WORKLOADS = (Workload("dry-lora", "a tiny layer", lora(1, 24, 24, 24, 4)), flat(131))


def is_flat(workload: Workload) -> bool:
    """Whether it is one long tensor."""
    return len(workload.shapes) == 1


def tensors(workload: Workload, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """Fresh parameters with gradients of the same dtype, drawn on the device: the same values every time."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in workload.shapes:
        value, grad = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        param = torch.nn.Parameter(value.uniform_(-1, 1, generator=generator))
        param.grad = grad.uniform_(-0.01, 0.01, generator=generator)
        params.append(param)
    return params
