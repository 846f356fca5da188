"""Correctness before speed: what is timed must equal the `reference` backend bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.contenders import GpuContender
from benchmarks.gpu.workloads import is_flat, tensors
from benchmarks.speed.contenders import IVON_ARGS
from benchmarks.speed.workloads import Workload
from ivon_kernels import IVON, noise

STEPS = 2
PREFIX = 2**20  # elements of a flat tensor that the reference computes as well
_STATE = ("mean", "momentum", "hess")


def _train(params: list[torch.nn.Parameter], backend: str, one_launch: bool) -> IVON:
    optimizer = IVON(params, **IVON_ARGS, seed=0, backend=backend, sample_in_step=one_launch)
    for _ in range(STEPS):
        optimizer.train()
        optimizer.step()
    return optimizer


def _results(optimizer: IVON, params: list[torch.nn.Parameter]) -> list[Tensor]:
    """Sample and mean as the weights hold them, and the state."""
    optimizer.train()
    sample = [param.detach().clone() for param in params]
    optimizer.eval()
    state = [optimizer.state[param][key] for param in params for key in _STATE]
    return [*sample, *(param.detach() for param in params), *state]


class Reference:
    """What the reference makes of a workload; of a flat one, of its first :data:`PREFIX` elements."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        self.workload, self.dtype, self.device = workload, dtype, device
        params = tensors(workload, dtype, device)
        if is_flat(workload):
            (param,) = params
            assert param.grad is not None
            head = torch.nn.Parameter(param.detach()[:PREFIX].clone())
            head.grad = param.grad[:PREFIX].clone()
            params = [head]
        self._expected = [value.clone() for value in _results(_train(params, "reference", False), params)]

    def check(self, contender: GpuContender) -> str | None:
        """Why a contender of ours must not be timed, or None.

        Two steps and the sample of the third one must be equal bit for bit. Beyond the prefix of a flat tensor the last
        elements' sample must be the one that their mean, their hess and the public noise give.
        """
        assert contender.backend is not None
        try:
            params = tensors(self.workload, self.dtype, self.device)
            optimizer = _train(params, contender.backend, contender.mode == "one launch")
            actual = _results(optimizer, params)
            if is_flat(self.workload):
                actual = [value[:PREFIX] for value in actual]
            if not all(torch.equal(a, b) for a, b in zip(actual, self._expected, strict=True)):
                return "differs from the reference; not timed"
            if is_flat(self.workload) and self._tail_differs(optimizer, params[0]):
                return "the sample of the last elements differs from mean and noise; not timed"
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None

    def _tail_differs(self, optimizer: IVON, param: torch.nn.Parameter) -> bool:
        start = max(param.numel() - PREFIX, 0)
        optimizer.train()
        group, state = optimizer.param_groups[0], optimizer.state[param]
        mean, hess = state["mean"][start:], state["hess"][start:]
        eps = noise.normals(mean.numel(), seed=0, step=STEPS, start=start, device=param.device)
        expected = mean + eps / noise.sqrt((hess + group["weight_decay"]) * group["ess"])
        return not torch.equal(param.detach()[start:], expected.to(param.dtype))
