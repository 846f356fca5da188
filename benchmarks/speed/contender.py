"""What is measured: each contender does the optimizer's part of one training step on its own copy of the tensors."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.environment import version
from benchmarks.speed import traffic
from ivon_kernels import available_backends

Parameters = list[torch.nn.Parameter]
BASELINE, FOREACH, IVON_OPT = "AdamW (fused)", "AdamW (foreach)", "ivon-opt 0.1.3"
STEP, SAVE, LOAD = "step", "save", "load"


class WrongError(Exception):
    """A contender's result is not what it should be."""


def reason(error: Exception) -> str:
    """An exception as a row of the tables shows it."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, WrongError) else f"{type(error).__name__}: {text}"


class Recipe(NamedTuple):
    """Hyperparameters; times do not depend on them."""

    adamw: dict[str, Any]
    ivon: dict[str, Any]


# Learning rates large enough for two steps to be seen in bfloat16 weights.
LARGE_STEPS = Recipe(
    {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}, {"lr": 1.0, "ess": 1e6, "hess_init": 1e-2}
)
# For a model that shall stay sound: the published recipe, IVON.for_lora, in the terms that ivon-opt has too.
_PUBLISHED = {"lr": 0.03, "ess": 1e7, "hess_init": 1e-3, "weight_decay": 1e-6, "clip_radius": 1e-3}
LORA = Recipe({"lr": 1e-4, "weight_decay": 0.01}, {**_PUBLISHED, "rescale_lr": False})


def nothing() -> None:
    """Where a step has nothing to do."""


@dataclass(frozen=True)
class Step:
    """What is timed, again and again: `begin` comes before a forward pass, `finish` after the backward pass."""

    finish: Callable[[], object]
    begin: Callable[[], object] = nothing
    before: Callable[[], object] | None = None  # called before each step, and not timed
    optimizer: Any = None
    tensors: Callable[[], list[Tensor]] | None = None  # further results that must be right
    check: Callable[[], None] = nothing  # raises WrongError if what the step did is not right

    def run(self) -> None:
        """Both halves, of a step whose gradients are there already."""
        self.begin()
        self.finish()

    def __call__(self) -> None:
        if self.before is not None:
            self.before()
        self.run()


Build = Callable[[Parameters, Recipe], Step]


@dataclass(frozen=True)
class Contender:
    """A named way to do one thing; the package's docstring says how to add one."""

    name: str
    build: Build  # makes the optimizer
    operations: tuple[str, ...] = ()  # keys of traffic.OPERATIONS
    quantity: str = STEP
    package: str | None = None  # a peer's distribution
    like_adamw: Callable[[Tensor, Tensor, Recipe], float] | None = None  # distance of weights in units of the allowed
    backend: str | None = None  # of ivon_kernels, for ours
    expected: str = ""  # for ours: the mode in which the reference has its bits
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

    def bytes_per_element(self, dtype: torch.dtype) -> int | None:
        """Bytes that must move per element; None where nobody counted."""
        return traffic.bytes_per_element(self.operations, dtype) if self.operations else None


def checkpoints(name: str, build: Build, **options: Any) -> list[Contender]:
    """Contenders that save and load an optimizer's state, in memory: ``torch.save`` and ``torch.load``, with no disk.

    Args:
        name: Of the optimizer.
        build: Gives its step.
        **options: Further fields of the contenders.
    """

    def checkpoint(params: Parameters, recipe: Recipe, loads: bool) -> Step:
        step = build(params, recipe)
        optimizer, buffer = step.optimizer, io.BytesIO()
        step()

        def save() -> None:
            buffer.seek(0)
            torch.save(optimizer.state_dict(), buffer)

        def saved() -> Any:
            buffer.seek(0)
            return torch.load(buffer, weights_only=False)

        def check() -> None:
            pair = [[x for x in tree_leaves(s) if isinstance(x, Tensor)] for s in (saved(), optimizer.state_dict())]
            if len(pair[0]) != len(pair[1]) or not all(map(torch.equal, *pair)):
                raise WrongError(f"what was {'loaded' if loads else 'saved'} is not the optimizer's state")

        save()
        return Step((lambda: optimizer.load_state_dict(saved())) if loads else save, optimizer=optimizer, check=check)

    options = {"most_elements": 10_000_000, **options}
    return [
        Contender(name, lambda params, recipe: checkpoint(params, recipe, False), quantity=SAVE, **options),
        Contender(name, lambda params, recipe: checkpoint(params, recipe, True), quantity=LOAD, **options),
    ]
