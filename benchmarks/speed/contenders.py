"""What is measured: each contender does the optimizer's part of one training step on its own copy of the tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.workloads import Workload
from ivon_kernels import IVON

Step = Callable[[], None]
IVON_ARGS: dict[str, Any] = {"lr": 1e-3, "ess": 1e6, "hess_init": 1e-2}
BASELINE = "AdamW (fused)"
REFERENCE = "ivon_kernels, reference backend"


@dataclass(frozen=True)
class Contender:
    """A named way to take one optimizer step: `build` makes the parameters and returns the step."""

    name: str
    build: Callable[[list[torch.nn.Parameter]], Step]
    turns: int = 1_000  # at most so many rounds, for those that take seconds

    def prepare(self, workload: Workload) -> Step:
        """The step on fresh parameters of the workload."""
        return self.build(workload.parameters())


def _modes(backend: str, one_pass: bool) -> Callable[[list[torch.nn.Parameter]], Step]:
    def build(params: list[torch.nn.Parameter]) -> Step:
        optimizer = IVON(params, **IVON_ARGS, seed=0, backend=backend, sample_in_step=one_pass)

        def step() -> None:
            optimizer.train()
            optimizer.step()

        return step

    return build


def _context(params: list[torch.nn.Parameter]) -> Step:
    optimizer = IVON(params, **IVON_ARGS, seed=0, backend="cpu")

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def _ivon_opt(params: list[torch.nn.Parameter]) -> Step:
    import ivon

    optimizer = ivon.IVON(params, **IVON_ARGS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        optimizer.step()

    grads = [param.grad for param in params]
    return step


def _adamw(**options: Any) -> Callable[[list[torch.nn.Parameter]], Step]:
    def build(params: list[torch.nn.Parameter]) -> Step:
        optimizer = torch.optim.AdamW(params, lr=1e-5, **options)

        def step() -> None:
            optimizer.step()

        return step

    return build


CONTENDERS = (
    Contender(BASELINE, _adamw(fused=True)),
    Contender("ivon_kernels, one pass", _modes("cpu", one_pass=True)),
    Contender("ivon_kernels, sample + step", _modes("cpu", one_pass=False)),
    Contender("ivon_kernels, context + step", _context),
    Contender("AdamW (foreach)", _adamw(foreach=True)),
    Contender("AdamW (loop)", _adamw(foreach=False, fused=False)),
    Contender(REFERENCE, _modes("reference", one_pass=False), turns=1),
    Contender("ivon-opt 0.1.3", _ivon_opt),
)
OURS = "ivon_kernels, sample + step"
ONE_PASS = "ivon_kernels, one pass"
IVON_OPT = "ivon-opt 0.1.3"


def check(workload: Workload) -> None:
    """Two steps of the cpu backend must equal the reference bit for bit before anything is timed.

    Raises:
        AssertionError: If they do not.
    """
    results = []
    for backend in ("reference", "cpu"):
        params = workload.parameters()
        optimizer = IVON(params, **IVON_ARGS, seed=0, backend=backend)
        for _ in range(2):
            optimizer.train()
            optimizer.step()
        results.append([torch.cat([p.detach().flatten(), optimizer.state[p]["hess"].flatten()]) for p in params])
    for left, right in zip(*results, strict=True):
        if not torch.equal(left, right):
            raise AssertionError(f"{workload.name}: the cpu backend differs from the reference; nothing was timed")


def silence_known_warnings() -> None:
    """ivon-opt warns from inside torch on every construction; the table is not the place for it."""
    warnings.filterwarnings("ignore", module="ivon")
