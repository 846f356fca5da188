"""What is measured: each contender does the optimizer's part of one training step on its own copy of the tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from benchmarks.environment import version
from benchmarks.gpu import traffic
from benchmarks.gpu.compiled import compiled_reference
from benchmarks.speed.contenders import BASELINE, CONTENDERS, IVON_ARGS, IVON_OPT, Contender, Step, _modes
from ivon_kernels import available_backends

__all__ = ["ADAMW", "BASELINE", "IVON_OPT", "MODES", "GpuContender", "contenders", "our_backends", "our_name"]

ADAMW = ("adamw",)
MODES = {"plain": "sample + step", "one launch": "step with next sample"}
_OPERATIONS = {"plain": ("sample", "check", "step"), "one launch": ("check", "step and next sample")}


@dataclass(frozen=True)
class GpuContender(Contender):
    """A contender of the speed benchmark, with what it needs and what it moves."""

    operations: tuple[str, ...] = ADAMW  # keys of traffic.OPERATIONS
    backend: str | None = None  # of ivon_kernels
    mode: str | None = None  # a key of MODES
    package: str | None = None  # a peer's distribution

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is not None and version(self.package) is None:
            return f"{self.package} is not installed"
        if self.backend is not None:
            return available_backends().get(self.backend, f"this version has no backend {self.backend!r}")
        return None

    def bytes_per_element(self, dtype: torch.dtype) -> int:
        """Bytes that one step must move per element."""
        return traffic.bytes_per_element(self.operations, dtype)


def our_name(backend: str, mode: str) -> str:
    """The name of one of our own contenders."""
    return f"ivon_kernels {backend}, {MODES[mode]}"


def our_backends(device: torch.device) -> tuple[str, ...]:
    """The backends to compare: the GPU's, or in a dry run those that take CPU tensors."""
    if device.type != "cpu":
        return ("triton", "cuda")
    return ("cpu", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu",)


def _optimi(params: list[torch.nn.Parameter]) -> Step:
    optimi: Any = import_module("optimi")
    optimizer = optimi.AdamW(params, lr=1e-5, triton=True)

    def step() -> None:
        optimizer.step()

    return step


def contenders(device: torch.device) -> Sequence[GpuContender]:
    """All contenders; the first one is the baseline of the ratios."""
    peers = {contender.name: contender.build for contender in CONTENDERS}
    ours = [
        GpuContender(
            our_name(backend, mode),
            _modes(backend, one_pass=mode == "one launch"),
            operations=_OPERATIONS[mode],
            backend=backend,
            mode=mode,
        )
        for backend in our_backends(device)
        for mode in MODES
    ]
    unchecked = ("sample, no check for edits", "step")
    return (
        GpuContender(BASELINE, peers[BASELINE]),
        *ours,
        GpuContender("AdamW (foreach)", peers["AdamW (foreach)"]),
        GpuContender("optimi AdamW (triton)", _optimi, operations=("adamw", "kahan"), package="torch-optimi"),
        GpuContender("IVON equations, torch.compile", compiled_reference(IVON_ARGS), operations=unchecked),
        GpuContender(IVON_OPT, peers[IVON_OPT], operations=unchecked, package="ivon-opt"),
    )
