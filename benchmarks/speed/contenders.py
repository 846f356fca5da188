"""What is measured: each contender does the optimizer's part of one training step on its own copy of the tensors."""

from __future__ import annotations

import io
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import version
from benchmarks.speed import traffic
from benchmarks.speed.workloads import Workload
from ivon_kernels import available_backends

Parameters = list[torch.nn.Parameter]
# Learning rates large enough for two steps to be seen in bfloat16 weights; times do not depend on them.
IVON_ARGS: dict[str, Any] = {"lr": 1.0, "ess": 1e6, "hess_init": 1e-2}
ADAMW_ARGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
BASELINE = "AdamW (fused)"
IVON_OPT = "ivon-opt 0.1.3"
STEP, SAVE, LOAD = "step", "save", "load"


class WrongError(Exception):
    """A contender's result is not what it should be."""


@dataclass(frozen=True)
class Step:
    """What is timed, again and again."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None  # called before each `run`, and not timed
    optimizer: Any = None
    tensors: Callable[[], list[Tensor]] | None = None  # further results that must be right
    check: Callable[[], None] | None = None  # raises WrongError if what `run` did is not right

    def __call__(self) -> None:
        if self.before is not None:
            self.before()
        self.run()


@dataclass(frozen=True)
class Contender:
    """A named way to do one thing; the package's docstring says how to add one."""

    name: str
    build: Callable[[Parameters], Step]  # makes the optimizer
    operations: tuple[str, ...] = ()  # keys of traffic.OPERATIONS
    quantity: str = STEP
    package: str | None = None  # a peer's distribution
    like_adamw: Callable[[Tensor, torch.dtype], tuple[float, float]] | None = None  # distance of weights, and at most
    backend: str | None = None  # of ivon_kernels, for ours
    expected: str = ""  # for ours: a key of ours.REFERENCES, whose bits it must have
    compiles: bool = False  # for longer than everything else takes: not in --quick
    turns: int = 1_000  # at most so many rounds
    most_elements: int | None = None  # not above it on the CPU
    bytes_needed: int = 64  # of memory per element, at most: where less is free, it does not begin

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of this project."""
        return self.backend is not None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is not None and version(self.package) is None:
            return f"{self.package} is not installed"
        if self.backend is not None:
            return available_backends().get(self.backend, f"this version has no backend {self.backend!r}")
        return None

    def prepare(
        self, workload: Workload, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Step:
        """The step on fresh parameters of the workload."""
        return self.build(workload.parameters(dtype, device))

    def bytes_per_element(self, dtype: torch.dtype) -> int | None:
        """Bytes that must move per element; None where nobody counted."""
        return traffic.bytes_per_element(self.operations, dtype) if self.operations else None


def all_contenders(device: torch.device) -> Sequence[Contender]:
    """Everything that is measured on the device; the first one is the baseline of the ratios."""
    from benchmarks.speed import ours, peers

    names = sorted(module.name for module in pkgutil.iter_modules(peers.__path__))
    found: list[Contender] = []
    for name in names:
        found += import_module(f"{peers.__name__}.{name}").contenders(device)
    baseline = next(contender for contender in found if (contender.name, contender.quantity) == (BASELINE, STEP))
    return (baseline, *ours.contenders(device), *(contender for contender in found if contender is not baseline))


def contenders(device: torch.device) -> Sequence[Contender]:
    """Those that take a whole optimizer step."""
    return tuple(contender for contender in all_contenders(device) if contender.quantity == STEP)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(name: str, make: Callable[[Parameters], tuple[Any, Step]], **options: Any) -> list[Contender]:
    """Contenders that save and load an optimizer's state, in memory: ``torch.save`` and ``torch.load``, with no disk.

    Args:
        name: Of the optimizer.
        make: Gives an optimizer and its step.
        **options: Further fields of the contenders.
    """

    def saving(params: Parameters) -> Step:
        optimizer, step = make(params)
        step()
        buffer = io.BytesIO()

        def check() -> None:
            _same_state(_read(buffer), optimizer.state_dict(), "what was saved")

        return Step(lambda: _write(optimizer, buffer), optimizer=optimizer, check=check)

    def loading(params: Parameters) -> Step:
        optimizer, step = make(params)
        step()
        buffer = io.BytesIO()
        _write(optimizer, buffer)

        def check() -> None:
            _same_state(optimizer.state_dict(), _read(buffer), "what was loaded")

        return Step(lambda: optimizer.load_state_dict(_read(buffer)), optimizer=optimizer, check=check)

    options = {"most_elements": 10_000_000, **options}
    return [Contender(name, build, quantity=what, **options) for what, build in ((SAVE, saving), (LOAD, loading))]


def _write(optimizer: Any, buffer: io.BytesIO) -> None:
    buffer.seek(0)
    torch.save(optimizer.state_dict(), buffer)


def _read(buffer: io.BytesIO) -> Any:
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested structure, in its order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def _same_state(found: Any, expected: Any, what: str) -> None:
    left, right = _tensors(found), _tensors(expected)
    if len(left) != len(right) or not all(torch.equal(a, b) for a, b in zip(left, right, strict=True)):
        raise WrongError(f"{what} is not the optimizer's state")
