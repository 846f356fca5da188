"""The tensors that the benchmarks walk."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PATTERN = 2**20  # random values; longer tensors repeat them


@dataclass(frozen=True)
class Workload:
    """A named list of parameter shapes."""

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]
    tensors: tuple[tuple[Tensor, Tensor], ...] = ()  # of these values and gradients, in place of random ones

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def is_flat(self) -> bool:
        """Whether it is one long tensor."""
        return len(self.shapes) == 1

    def parameters(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> list[torch.nn.Parameter]:
        """Fresh parameters in [-1, 1) with gradients of the same dtype in [-0.01, 0.01), the same values every time."""
        tensors = [(value.clone(), grad.clone()) for value, grad in self.tensors]
        if not tensors:
            generator = torch.Generator().manual_seed(0)
            size = min(_PATTERN, max(torch.Size(shape).numel() for shape in self.shapes))
            pattern = torch.empty(2, size).uniform_(-1, 1, generator=generator).to(device)
            for number, shape in enumerate(self.shapes):
                value, grad = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
                _fill(value, pattern[0].roll(number))
                _fill(grad, pattern[1].roll(number) * 0.01)
                tensors.append((value, grad))
        params = [torch.nn.Parameter(value) for value, _ in tensors]
        for param, (_, grad) in zip(params, tensors, strict=True):
            param.grad = grad
        return params

    def head(self, most: int) -> Workload:
        """The first of its tensors, of `most` elements and the rest of the last one; of a flat one so many elements."""
        if self.tensors:
            return self
        if self.is_flat:
            return Workload(self.name, self.title, ((min(self.elements, most),),))
        ends = list(itertools.accumulate(torch.Size(shape).numel() for shape in self.shapes))
        return Workload(self.name, self.title, self.shapes[: 1 + sum(end < most for end in ends[:-1])])


def _fill(tensor: Tensor, values: Tensor) -> None:
    """Repeat the values, rounded to the tensor's dtype: drawing a billion numbers takes longer than the steps."""
    for part in tensor.view(-1).split(values.numel()):
        part.copy_(values[: part.numel()])


def lora(layers: int, width_in: int, width_q: int, width_v: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """A and B of LoRA on the q and v projections of every layer."""
    return _adapters(((width_in, width_q), (width_in, width_v)), rank) * layers


def _adapters(linears: tuple[tuple[int, int], ...], rank: int) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for inner, outer in linears for shape in ((rank, inner), (outer, rank)))


def short(elements: int) -> str:
    """As people say it: 131, 4.19M, 1B."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if elements >= unit:
            return f"{elements / unit:.3g}{name}"
    return str(elements)


def flat(elements: int) -> Workload:
    """One tensor."""
    return Workload(f"flat-{short(elements)}", "one tensor", ((elements,),))


# Llama-2-7B: 32 layers; q, k, v, o are 4096 x 4096, gate and up 4096 -> 11008, down 11008 -> 4096.
_LLAMA_LINEAR = ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),)

# In the order in which they are measured: when the time runs out, the last ones are left out.
WORKLOADS = (
    Workload("llama-2-7b-r8-qv", "Llama-2-7B, LoRA r=8 on q, v", lora(32, 4096, 4096, 4096, 8)),
    Workload("llama-2-7b-r16-all", "Llama-2-7B, LoRA r=16, all linear", _adapters(_LLAMA_LINEAR, 16) * 32),
    flat(100_000_000),
    Workload("smollm2-135m-r8-qv", "SmolLM2-135M, LoRA r=8 on q, v", lora(30, 576, 576, 192, 8)),
    Workload("128-tiny", "128 tensors of 16x64", ((16, 64),) * 128),
    Workload("450-tiny", "450 tensors of 16x64", ((16, 64),) * 450),
    flat(10_000_000),
    flat(1_000_000),
    flat(1_000_000_000),
)
QUICK = ("llama-2-7b-r8-qv", "smollm2-135m-r8-qv", "450-tiny", "flat-1M", "flat-10M")
# The same code where nothing is to be measured: a few tensors, one of them of an odd size.
DRY_WORKLOADS = (Workload("dry-lora", "a tiny layer", lora(1, 24, 24, 24, 4)), flat(131))
