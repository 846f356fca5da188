"""The tensors that the benchmarks walk."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """A named list of parameter shapes."""

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Fresh float32 parameters with gradients, the same values every time."""
        generator = torch.Generator().manual_seed(0)
        params = []
        for shape in self.shapes:
            param = torch.nn.Parameter(torch.empty(shape).uniform_(-1, 1, generator=generator))
            param.grad = torch.empty(shape).uniform_(-0.01, 0.01, generator=generator)
            params.append(param)
        return params


def lora(layers: int, width_in: int, width_q: int, width_v: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """A and B of LoRA on the q and v projections of every layer."""
    layer = ((rank, width_in), (width_q, rank), (rank, width_in), (width_v, rank))
    return layer * layers


def flat(elements: int) -> Workload:
    """One tensor."""
    return Workload(f"flat-{elements}", f"one tensor, {elements / 1e6:g}M", ((elements,),))


WORKLOADS = (
    Workload("llama-2-7b", "Llama-2-7B, LoRA r=8 on q, v", lora(32, 4096, 4096, 4096, 8)),
    Workload("smollm2-135m", "SmolLM2-135M, LoRA r=8 on q, v", lora(30, 576, 576, 192, 8)),
    Workload("128-tiny", "128 tensors of 16x64", ((16, 64),) * 128),
    Workload("450-tiny", "450 tensors of 16x64", ((16, 64),) * 450),
)
