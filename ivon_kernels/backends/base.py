"""What a backend is: the operations that the optimizer asks for, and the reasons why one cannot be had."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ivon_kernels.backends.state import Launch


class StepScalars(NamedTuple):
    """Everything of one step that does not depend on the element, in double; the order is that of the C struct."""

    ess: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    one_minus_beta2: float
    inv_debias: float  # 1 / (1 - beta1^t), or 1
    lr: float  # times (hess_init + weight_decay) with rescale_lr
    clip_radius: float  # may be inf
    hess_floor: float  # smallest hess kept: hess_floor + weight_decay > 0 in float32
    hess_ceiling: float  # largest hess kept: ess * hess stays finite in float32
    grad_scale: float  # 1 / (AMP scale * MC samples)
    second_scale: float  # the same for the Hessian statistic: g * eps (price) or g * g (gradsq)
    gradsq: float  # 0: price, 1: gradsq


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


class Backend(ABC):
    """Operations on a list of slots. All of them leave versions and ``grad`` fields to the optimizer."""

    name: ClassVar[str]
    keeps_noise: ClassVar[bool] = False  # stores a sample's normals until the step instead of drawing them again
    compiled: ClassVar[bool] = True  # takes pointers; others take tensors, from the slots
    on_device: ClassVar[bool] = False  # decides on the device whether a step is taken: see backends/device.py

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why the backend cannot be used at all in this process, or None."""

    @abstractmethod
    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the backend does not take parameters of this device and dtype, or None."""

    @abstractmethod
    def sample(self, slots: Launch, draw: Draw, adopt: bool) -> None:
        """Weights <- mean + sigma eps. With `adopt` the weights hold the mean: edits are taken over first."""

    @abstractmethod
    def restore(self, slots: Launch) -> None:
        """Weights <- mean."""

    @abstractmethod
    def find_nonfinite(self, slots: Launch) -> int | None:
        """Position of the first slot whose gradient holds inf or nan."""

    @abstractmethod
    def accumulate(self, slots: Launch, draw: Draw) -> None:
        """Add the gradient of the finished sample `draw` to the sums."""

    @abstractmethod
    def step(self, slots: Launch, draw: Draw, adopt: bool, draw_next: bool) -> None:
        """Update mean, momentum and hess from the gradients (under sample `draw`) and the sums; None counts as 0.

        Weights <- new mean, or sample 0 of the next step with `draw_next`. Counts the step.
        """
