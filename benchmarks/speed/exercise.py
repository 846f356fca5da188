"""A small training run over every path of a backend, checked bit for bit: what compute-sanitizer watches.

``python -m benchmarks.speed.exercise cuda`` trains odd sizes, unaligned and strided tensors, hundreds of tensors,
several samples, both modes, a GradScaler's scale and overflow, with all dtypes, and the same on the processor: with the
`cpu` backend, which equals `reference` and is quick enough, or with `reference` where that is missing or under test
itself.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ivon_kernels import IVON, available_backends

_ARGS: dict[str, Any] = {"lr": 1e-2, "ess": 1e4, "hess_init": 1e-2}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (1023,), (4099,), (7, 13), (64, 64))
_MANY = 200  # further small tensors


def parameters(dtype: torch.dtype, device: torch.device, many: int) -> list[torch.nn.Parameter]:
    """Aligned, unaligned and transposed parameters, the same values every time."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.empty(shape).uniform_(-1, 1, generator=generator).to(dtype).to(device)

    plain = [values(*shape) for shape in (*_SHAPES, *((16, 5),) * many)]
    return [torch.nn.Parameter(value) for value in (*plain, values(2050)[1:], values(33, 20).t())]


def _set_grads(params: list[torch.nn.Parameter], number: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(number)
    for param in params:
        grad = torch.empty(param.shape).uniform_(-0.01, 0.01, generator=generator)
        param.grad = (grad * scale).to(param.dtype).to(param.device)


def train(
    backend: str, dtype: torch.dtype, device: torch.device, *, one_launch: bool, many: int = 0
) -> list[torch.Tensor]:
    """Six steps; returns the weights and the state, on the CPU."""
    params = parameters(dtype, device, many)
    half = len(params) // 2
    groups: list[dict[str, Any]] = [
        {"params": params[:half]},
        {"params": params[half:], "hess_approx": "gradsq", "clip_radius": 1e-3},
    ]
    optimizer = IVON(groups, **_ARGS, seed=3, backend=backend, sample_in_step=one_launch, nonfinite="skip")
    for number in range(3):  # one sample, the same tensor of gradients read at the step
        optimizer.train()
        _set_grads(params, number, 1.0)
        if number == 1:
            params[4].grad = None
        optimizer.step()
    optimizer.discard_samples()  # the next one, which the step may have drawn already
    for sample in range(2):  # two samples
        with optimizer.sampled_params(train=True):
            _set_grads(params, 10 + sample, 1.0)
    optimizer.step()
    for overflow in (1.0, 0.0):  # what a GradScaler sets: a skipped step, then a taken one
        optimizer.train()
        _set_grads(params, 20, 8.0)
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
    for dtype in _DTYPES:
        expected = train(judge, dtype, cpu, one_launch=False, many=many)
        for one_launch in (False, True):
            actual = train(backend, dtype, device, one_launch=one_launch, many=many)
            if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
                print(f"{backend} differs from {judge}: {dtype}, sample_in_step={one_launch}")
                return 1
    print(f"{backend} equals {judge} bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
