"""What is measured: each contender does the optimizer's part of one training step on its own copy of the tensors."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.environment import version
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
# For a model that shall stay sound: the published recipe for LoRA, in the terms that ivon-opt has too.
_PUBLISHED = {"lr": 0.03, "ess": 1e6, "hess_init": 1e-3, "weight_decay": 0.0, "clip_radius": 1e-3}
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


class Traffic(NamedTuple):
    """Values that one operation moves for every element of a parameter.

    It reads each of its inputs once and writes each of its outputs once; what a cache or a register holds between two
    operations (two launches, two calls) is not counted on, what one launch holds is.
    """

    weights: int  # in the parameter's dtype
    grads: int  # in the gradient's dtype
    state: int  # in float32
    why: str
    quantized: int = 0  # of one byte


OPERATIONS = {
    "sample": Traffic(2, 0, 2, "read weight (was it edited?), mean, hess; write weight"),
    "sample, no check for edits": Traffic(1, 0, 2, "read mean, hess; write weight"),
    "restore": Traffic(1, 0, 1, "read mean; write weight"),
    "check": Traffic(0, 1, 0, "read grad (inf or nan?)"),
    "step": Traffic(1, 1, 6, "read grad, mean, momentum, hess; write mean, momentum, hess, weight"),
    "step and next sample": Traffic(1, 1, 6, "as step: the next sample comes from the new mean and hess in registers"),
    "write noise": Traffic(0, 0, 1, "the cpu backend keeps a training sample's noise: drawing it again takes longer"),
    "read noise": Traffic(0, 0, 1, "the cpu backend reads it again at the step"),
    "clear sums": Traffic(0, 0, 2, "several samples: write the sums of g and g * noise"),
    "accumulate": Traffic(0, 1, 4, "read grad and the two sums, write the sums"),
    "read sums": Traffic(0, 0, 2, "read the two sums"),
    "adamw": Traffic(6, 1, 0, "read weight, grad and two moments of the weight's dtype; write weight and moments"),
    "kahan": Traffic(2, 0, 0, "read and write a compensation of the weight's dtype (16 bit only)"),
    "adamw, 8-bit moments": Traffic(2, 1, 0, "read weight, grad and two bytes of moments; write weight and moments", 4),
}


def bytes_per_element(operations: tuple[str, ...], dtype: torch.dtype) -> int:
    """Bytes that these of :data:`OPERATIONS` must move per element, with weights and gradients of `dtype`."""
    parts = [OPERATIONS[name] for name in operations if name != "kahan" or dtype.itemsize < 4]
    return sum(dtype.itemsize * (part.weights + part.grads) + 4 * part.state + part.quantized for part in parts)


@dataclass(frozen=True)
class Contender:
    """A named way to do one thing."""

    name: str  # as the tables show it, the version included where it matters
    build: Build  # makes the optimizer of parameters that have gradients; imports of a peer belong in here
    operations: tuple[str, ...] = ()  # what a step moves through memory
    quantity: str = STEP
    package: str | None = None  # the distribution of a peer that may be missing
    # The distance of weights from AdamW's after two steps, in units of the allowed, for those with its update.
    like_adamw: Callable[[Tensor, Tensor, Recipe], float] | None = None
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
        return bytes_per_element(self.operations, dtype) if self.operations else None


def checkpoints(name: str, build: Build, **options: Any) -> list[Contender]:
    """Contenders that save and load an optimizer's state in memory: ``torch.save`` and ``torch.load``, with no disk."""

    def checkpoint(loads: bool, params: Parameters, recipe: Recipe) -> Step:
        step, buffer = build(params, recipe), io.BytesIO()
        step()

        def save() -> None:
            buffer.seek(0)
            torch.save(step.optimizer.state_dict(), buffer)

        def saved() -> Any:
            buffer.seek(0)
            return torch.load(buffer, weights_only=False)

        def load() -> None:
            step.optimizer.load_state_dict(saved())

        def check() -> None:
            states = (saved(), step.optimizer.state_dict())
            pair = [[leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)] for state in states]
            if len(pair[0]) != len(pair[1]) or not all(map(torch.equal, *pair)):
                raise WrongError(f"what was {'loaded' if loads else 'saved'} is not the optimizer's state")

        save()
        return Step(load if loads else save, check=check)

    both: dict[str, Any] = {"most_elements": 10_000_000, **options}
    ways = ((SAVE, False), (LOAD, True))
    return [Contender(name, partial(checkpoint, loads), quantity=quantity, **both) for quantity, loads in ways]
