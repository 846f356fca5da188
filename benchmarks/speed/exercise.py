"""A small training run over every path of a backend, checked bit for bit: what compute-sanitizer watches.

``python -m benchmarks.speed.exercise cuda`` trains odd sizes, unaligned and strided tensors, hundreds of tensors,
several samples, both modes, a GradScaler's scale and overflow, with all dtypes, and the same on the processor: with the
`cpu` backend, which equals `reference` and is quick enough, or with `reference` where that is missing or under test.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ivon_kernels import IVON, available_backends

_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (1023,), (4099,), (7, 13), (64, 64))
_MANY = 200  # further small tensors


def _parameters(dtype: torch.dtype, device: torch.device, many: int) -> list[torch.nn.Parameter]:
    """Aligned, unaligned and transposed parameters, the same values every time."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.empty(shape).uniform_(-1, 1, generator=generator).to(dtype).to(device)

    plain = [values(*shape) for shape in (*_SHAPES, *((16, 5),) * many)]
    return [torch.nn.Parameter(value) for value in (*plain, values(2050)[1:], values(33, 20).t())]


def _train(
    backend: str, dtype: torch.dtype, device: torch.device, *, one_launch: bool, many: int
) -> list[torch.Tensor]:
    """Six steps; returns the weights and the state, on the CPU."""
    params = _parameters(dtype, device, many)
    half = len(params) // 2
    further: dict[str, Any] = {"params": params[half:], "hess_approx": "gradsq", "clip_radius": 1e-3}
    args: dict[str, Any] = {"lr": 1e-2, "ess": 1e4, "hess_init": 1e-2, "nonfinite": "skip"}
    groups = [{"params": params[:half]}, further]
    optimizer = IVON(groups, **args, seed=3, backend=backend, sample_in_step=one_launch)

    def set_grads(number: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(number)
        for param in params:
            grad = torch.empty(param.shape).uniform_(-0.01, 0.01, generator=generator)
            param.grad = (grad * scale).to(param.dtype).to(param.device)

    for number in range(3):  # one sample, the same tensor of gradients read at the step
        optimizer.train()
        set_grads(number)
        if number == 1:
            params[4].grad = None
        optimizer.step()
    optimizer.discard_samples()  # the next one, which the step may have drawn already
    for sample in range(2):  # two samples
        with optimizer.sampled_params(train=True):
            set_grads(10 + sample)
    optimizer.step()
    for overflow in (1.0, 0.0):  # what a GradScaler sets: a skipped step, then a taken one
        optimizer.train()
        set_grads(20, 8.0)
        optimizer.grad_scale = torch.tensor(8.0, device=device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(overflow, device=device)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.eval()
    state = [optimizer.state[param][key] for param in params for key in ("mean", "momentum", "hess")]
    return [value.detach().cpu() for value in (*params, *state)]


def main(backend: str) -> int:
    """Returns the exit code: 0, 1 for other bits than the reference's, 77 where there is no such backend."""
    if reason := available_backends().get(backend, f"this version has no backend {backend!r}"):
        print(f"skipped: {reason}")
        return 77
    dry = backend == "cpu"
    many = 0 if dry else _MANY
    judge = "reference" if dry or available_backends()["cpu"] else "cpu"
    device, cpu = torch.device("cpu" if dry else "cuda"), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = _train(judge, dtype, cpu, one_launch=False, many=many)
        for one_launch in (False, True):
            actual = _train(backend, dtype, device, one_launch=one_launch, many=many)
            if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
                print(f"{backend} differs from {judge}: {dtype}, sample_in_step={one_launch}")
                return 1
    print(f"{backend} equals {judge} bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
