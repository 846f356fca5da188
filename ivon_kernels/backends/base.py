"""What a backend is: the operations that the optimizer asks for, and the reasons why one cannot be had."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ivon_kernels.backends.addresses import Addresses
from ivon_kernels.backends.state import ParamState
from ivon_kernels.hyperparameters import GroupScalars

Derived = TypeVar("Derived")


class Draw(NamedTuple):
    """Which sample: see :mod:`ivon_kernels.noise`."""

    seed: int
    sample: int
    replica: int = 0
    step: int | None = None  # None: each parameter's own count of finished updates


class Guard(NamedTuple):
    """What decides on the device whether a step is taken, besides the gradients that were checked."""

    found_inf: Tensor | None = None  # GradScaler's: the step is skipped unless this is 0
    grad_scale: Tensor | None = None  # GradScaler's: the gradients still carry this scale
    report: bool = False  # tell the host of a skipped step, instead of only counting it
    final: bool = True  # the last launch of this step on its device: forgets what the checks found


class Launch:
    """Parameters that one call of a backend walks, all on one device.

    Attributes:
        backend: Which walks them.
        states: The parameters' states.
        addresses: Where the parameters and their gradients are, for compiled backends; None where the states say it.
        scalars: What the parameter groups tell the launch.
        summed: Whether any state's sums hold earlier MC samples of this step.
        cache: What the backend derives from the states, or None.
    """

    def __init__(self, backend: Backend, states: list[ParamState], scalars: GroupScalars) -> None:
        self.backend = backend
        self.states = states
        self.addresses = Addresses([state.param for state in states]) if backend.compiled else None
        self.scalars = scalars
        self.summed = False
        self.cache: Any = None
        self._sharded = [state for state in states if state.dtensor is not None]

    def mark_summed(self, summed: bool) -> None:
        """Note whether any state's sums hold earlier MC samples of this step."""
        self.summed = summed

    def derive(self, make: Callable[[Launch], Derived]) -> Derived:
        """Make what the backend keeps of the launch in `cache`."""
        self.cache = derived = make(self)
        return derived

    def moved(self, *, trained: bool = True) -> bool:
        """Whether a parameter's memory, strides or dtype, or with `trained` its ``requires_grad``, has changed."""
        if self.addresses is None:
            return any(state.moved() or (trained and not state.parameter.requires_grad) for state in self.states)
        if self.addresses.moved(trained=trained):
            return True
        # The addresses are those of local shards. FSDP2 replaces a DTensor's shard by another tensor (when it loads a
        # state dict, say), which the old shard does not show.
        return bool(self._sharded) and any(
            state.replaced() or (trained and not state.parameter.requires_grad) for state in self._sharded
        )


class Backend(ABC):
    """Operations on the parameters of a launch. They leave versions and ``grad`` fields to who calls them."""

    name: ClassVar[str]
    keeps_noise: ClassVar[bool] = False  # stores a sample's normals until the step instead of drawing them again
    compiled: ClassVar[bool] = True  # takes addresses; others take tensors, from the states
    on_device: ClassVar[bool] = False  # decides on the device whether a step is taken: see backends/device.py

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why the backend cannot be used at all in this process, or None."""

    @abstractmethod
    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the backend does not take parameters of this device and dtype, or None."""

    @abstractmethod
    def sample(self, launch: Launch, draw: Draw, adopt: bool) -> None:
        """Weights <- mean + sigma eps. With `adopt` the weights hold the mean: edits are taken over first."""

    @abstractmethod
    def restore(self, launch: Launch) -> None:
        """Weights <- mean."""

    @abstractmethod
    def find_nonfinite(self, launch: Launch) -> int | None:
        """Position of the first state whose gradient holds inf or nan."""

    @abstractmethod
    def accumulate(self, launch: Launch, draw: Draw) -> None:
        """Add the gradient of the finished sample `draw` to the sums."""

    @abstractmethod
    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool) -> None:
        """Update mean, momentum and hess from the gradients (under sample `draw`) and the sums; None counts as 0.

        Weights <- new mean, or sample 0 of the next step with `draw_next`. Counts the step.
        """
