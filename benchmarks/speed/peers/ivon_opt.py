"""ivon-opt, the original implementation, used as its documentation shows."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.speed.contenders import IVON_ARGS, IVON_OPT, Contender, Parameters, Step, checkpoints

_PACKAGE: dict[str, Any] = {"package": "ivon-opt", "bytes_needed": 80}


def _make(params: Parameters, samples: int = 1) -> tuple[Any, Step]:
    import ivon

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="ivon")  # about torch, on every construction
        optimizer = ivon.IVON(params, **IVON_ARGS, mc_samples=samples)
    grads = [param.grad for param in params]

    def step() -> None:
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
        optimizer.step()

    return optimizer, Step(step, optimizer=optimizer)


def _evaluation(params: Parameters) -> Step:
    optimizer, _ = _make(params)

    def step() -> None:
        with optimizer.sampled_params():
            pass

    return Step(step, optimizer=optimizer)


def contenders(device: torch.device) -> list[Contender]:
    """One and four samples, an evaluation sample, and checkpoints."""
    unchecked = ("sample, no check for edits", "step")
    four = ("sample, no check for edits",) * 4 + ("clear sums",) + ("accumulate",) * 3 + ("step", "read sums")
    return [
        Contender(IVON_OPT, lambda params: _make(params)[1], unchecked, **_PACKAGE),
        Contender(f"{IVON_OPT}, 4 samples", lambda params: _make(params, 4)[1], four, **_PACKAGE),
        Contender(
            IVON_OPT,
            _evaluation,
            ("sample, no check for edits", "restore"),
            quantity="evaluation sample",
            **_PACKAGE,
        ),
        *checkpoints(IVON_OPT, _make, **_PACKAGE),
    ]
