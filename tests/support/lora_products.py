"""Random LoRA matrices and inputs for the kernels of several samples, and what they must give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ivon_kernels.lora import reference
from ivon_kernels.lora.op import Factor

SEED = 2**64 - 3
Kernel = Callable[[Tensor, Tensor, Factor, Factor, float, int, Sequence[int]], None]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """Sizes and dtypes of one call."""

    samples: Sequence[int] = (3, 5)
    tokens: int = 5
    d_in: int = 40
    d_out: int = 24
    rank: int = 8
    x: torch.dtype = F32
    a: torch.dtype = F32
    b: torch.dtype = F32
    out: torch.dtype = F32
    shift: int = 0  # elements by which all tensors miss a 16-byte boundary

    def __str__(self) -> str:
        numbers = "-".join(map(str, self.samples[:4]))
        dtypes = "-".join(str(d).removeprefix("torch.") for d in dict.fromkeys((self.x, self.a, self.b, self.out)))
        return f"{numbers} {self.tokens}x{self.d_in}x{self.rank}x{self.d_out} {dtypes} +{self.shift}"


def of_dtypes(x: torch.dtype, a: torch.dtype, b: torch.dtype, out: torch.dtype, case: Case | None = None) -> Case:
    return replace(case or Case(rank=20), x=x, a=a, b=b, out=out)


class Problem:
    """The tensors of a case, each between NaNs.

    Args:
        case: Sizes and dtypes.
        device: Where the tensors are.
        seed: Of their values.
    """

    def __init__(self, case: Case, device: str = "cpu", seed: int = 0) -> None:
        self.case, self._shift, self._device = case, case.shift, device
        self._generator = torch.Generator().manual_seed(seed)
        rows = len(case.samples) * case.tokens
        self.a = self._factor(case.rank, case.d_in, 2**24 - 1, case.a)
        self.b = self._factor(case.d_out, case.rank, 5, case.b)
        self.x = self.placed(self._normal(rows, case.d_in).to(case.x))
        self.out = self.placed(self._normal(rows, case.d_out).to(case.out))

    def run(self, kernel: Kernel, scaling: float = 0.3) -> Tensor:
        """What a kernel makes of `out`, which stays as it is; nothing around it changes."""
        out = self.placed(self.out)
        storage = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        kernel(out, self.x, self.a, self.b, scaling, SEED, self.case.samples)
        assert int(storage.isnan().sum()) - int(out.isnan().sum()) == storage.numel() - out.numel()
        return out

    def reference(self, scaling: float = 0.3) -> Tensor:
        """Plain PyTorch, as PEFT computes it."""
        return self.run(reference.lora_samples_, scaling)

    def exact(self, scaling: float = 0.3) -> Tensor:
        """In float64, from weights that are rounded to their dtype."""
        out = self.out.double()
        for sample, x, to in zip(self.case.samples, *(t.split(self.case.tokens) for t in (self.x, out)), strict=True):
            a, b = (reference.sampled_weight(factor, SEED, sample).double() for factor in (self.a, self.b))
            to += scaling * (x.double() @ a.T @ b.T)
        return out

    def placed(self, value: Tensor) -> Tensor:
        """A copy between NaNs, on the device of the problem, aligned or not."""
        size = -(-value.numel() // 64) * 64 + 128
        buffer = torch.full((size,), float("nan"), dtype=value.dtype, device=self._device)
        return buffer[64 + self._shift :][: value.numel()].view(value.shape).copy_(value)

    def _normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator)

    def _factor(self, rows: int, columns: int, index: int, dtype: torch.dtype) -> Factor:
        """Some of the weights have no noise, some of these are pruned."""
        mean, inv_sigma = self._normal(rows, columns), self._normal(rows, columns).abs() * 5 + 0.5
        inv_sigma.flatten()[::7] = float("inf")
        mean.flatten()[::21] = 0.0
        return Factor(self.placed(mean), self.placed(inv_sigma), index, dtype)


def assert_accurate(problem: Problem, kernel: Kernel) -> None:
    """The error's root mean square is at most twice PyTorch's; of few elements, the largest is a matter of luck."""
    exact = problem.exact()
    ours, theirs = (
        (result.double() - exact).square().mean().sqrt() for result in (problem.run(kernel), problem.reference())
    )
    assert 0 < ours <= 2 * theirs, (ours, theirs)


def assert_same_weights(case: Case, kernel: Kernel, device: str = "cpu") -> None:
    """A_s and B_s are read back through unit matrices: products with 0 and 1 are exact.

    The dtypes of x and out are the weights', or float32. There are as many tokens as the probed matrix has columns.
    """
    for probed, (rows, columns) in {"a": (case.rank, case.d_in), "b": (case.d_out, case.rank)}.items():
        sizes = {"d_in": columns, "rank": rows if probed == "a" else columns, "d_out": rows, "tokens": columns}
        problem = Problem(replace(case, **sizes), device)
        size = sizes["rank"]
        unit = Factor(
            problem.placed(torch.eye(size)), problem.placed(torch.full((size, size), float("inf"))), 1, case.a
        )
        problem.b, problem.a = (unit, problem.a) if probed == "a" else (problem.b, unit)
        problem.x.copy_(torch.eye(columns).repeat(len(case.samples), 1))
        problem.out.zero_()
        factor = problem.a if probed == "a" else problem.b
        expected = torch.cat([reference.sampled_weight(factor, SEED, sample).T for sample in case.samples])
        assert torch.equal(problem.run(kernel, 1.0), expected.to(case.out))
