"""Optimizer state: one record per parameter, float32 (float64) state as views of flat arenas."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivon_kernels import sharding
from ivon_kernels.noise import Shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

STATE_KEYS = ("mean", "momentum", "hess")
_ALIGNMENT = 16  # elements: every view starts on a 64-byte boundary of its arena

NOTHING_BAD = 2**62
BLOCK_SIZE = 8
BAD, DONE, SKIPPED = range(3)  # words of DeviceFlags.block


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's state: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Pinned memory has one address for host and device, so a kernel can write to it without a copy or a wait. Nobody knows
# whether one is still to write when an optimizer is dropped: its 16 bytes stay, and are never given to another.
_PER_PAGE = 256
_pages: list[Tensor] = []
_numbers = itertools.count()
_lock = threading.Lock()


def _new_page() -> Tensor:
    return torch.zeros(_PER_PAGE, 2, dtype=torch.int64, device="cpu", pin_memory=True)


def _pinned_mailbox() -> Tensor:
    with _lock:
        page, place = divmod(next(_numbers), _PER_PAGE)
        if page == len(_pages):
            _pages.append(_new_page())
        return _pages[page][place]


class DeviceFlags:
    """What the kernels of one optimizer share on one device, and how they tell the host of a step that they skipped.

    Attributes:
        block: int64 ``[8]`` on the device: the first parameter whose gradient holds inf or nan (``NOTHING_BAD``: none),
            how many programs of the running launch have finished, how many steps were skipped without a report.
        mailbox: int64 ``[2]``, pinned host memory, which kernels write to directly: how many skipped steps were
            reported, and the parameter at fault in the last one. Reading it waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.block = torch.zeros(BLOCK_SIZE, dtype=torch.int64, device=device)
        self.block[BAD] = NOTHING_BAD
        on_cpu = device.type == "cpu"
        self.mailbox = torch.zeros(2, dtype=torch.int64, device="cpu") if on_cpu else _pinned_mailbox()
        self._letters = (ctypes.c_int64 * 2).from_address(self.mailbox.data_ptr())  # read without a tensor operation
        self.seen = 0

    def new_report(self) -> int | None:
        """Index of the parameter at fault in a skipped step that was reported since the last call, or None."""
        count = self._letters[0]
        if count == self.seen:
            return None
        self.seen = count
        return self._letters[1]

    def skipped(self) -> int:
        """Steps skipped without a report. Waits for the device."""
        return int(self.block[SKIPPED])

    def found(self) -> int:
        """The first parameter that the checks found, or ``NOTHING_BAD``. Waits for the device."""
        return int(self.block[BAD])

    def forget(self, *but: int) -> None:
        """Drop what the checks found; `but` are findings to keep instead."""
        self.block[BAD].fill_(min(but, default=NOTHING_BAD))


class Arena:
    """Flat state of several parameters of one device and state dtype.

    Attributes:
        mean, momentum, hess: ``[total]``, float32 or float64. Where nothing is trained, momentum is hess: never used.
        steps: int64 ``[parameters]`` on the same device: finished updates of each parameter. The backends count them.
        flags: What kernels share on this device, for backends that decide there whether a step is taken.
        noise: float32 ``[total]`` or None: the normals of the last training sample, for backends that keep them.
        noise_tags: int64 ``[parameters, 4]``: whose it is (seed, step, sample, replica).
        grad_sum, second_sum: ``[total]`` or None; sums over finished MC samples, made when a second sample is drawn.
        sums: ``[2 total + parameters + 4]`` or None: the memory of both, and of `tail`, which goes along when ranks add
            up their sums (:mod:`ivon_kernels.training.replicas`).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        *,
        keep_noise: bool = False,
        trained: bool = True,
        flags: DeviceFlags | None = None,
    ) -> None:
        self.offsets: list[int] = []
        total = 0
        for size in sizes:
            self.offsets.append(total)
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.mean = torch.zeros(total, device=device, dtype=dtype)
        self.hess = torch.zeros_like(self.mean)
        self.momentum = torch.zeros_like(self.mean) if trained else self.hess
        # On the device: a step that it skips must not count, and the host does not wait to learn of it.
        self.steps = torch.zeros(len(sizes), device=device, dtype=torch.int64)
        self.flags = flags
        self.noise = torch.empty(total, device=device, dtype=torch.float32) if keep_noise else None
        self.noise_tags = torch.full((len(sizes), 4), -1, dtype=torch.int64, device="cpu")
        self.sums: Tensor | None = None
        self.grad_sum: Tensor | None = None
        self.second_sum: Tensor | None = None

    def clear_sums(self) -> tuple[Tensor, Tensor]:
        """Zeroed sums, allocated on first use."""
        if self.sums is None:
            total = self.mean.numel()
            self.sums = self.mean.new_zeros(2 * total + len(self.offsets) + 4)
            self.grad_sum, self.second_sum = self.sums[:total], self.sums[total : 2 * total]
        else:
            self.sums.zero_()
        assert self.grad_sum is not None and self.second_sum is not None
        return self.grad_sum, self.second_sum

    @property
    def tail(self) -> Tensor:
        """``[parameters + 4]``, behind the sums."""
        assert self.sums is not None
        return self.sums[2 * self.mean.numel() :]


@dataclass(eq=False)
class ParamState:
    """One parameter as the backends see it. State tensors have its shape and are contiguous."""

    param: Tensor  # the memory that is trained: the parameter, or the local shard of a DTensor
    name: str
    index: int  # position among all parameters of the optimizer: the noise's parameter index
    group: int
    arena: Arena
    position: int  # in the arena
    dtensor: DTensor | None = None  # the parameter, if `param` is only its local shard
    shard: Shard | None = None  # where the elements of `param` are in the unsharded parameter; None: it is whole
    mean: Tensor = field(init=False)
    momentum: Tensor = field(init=False)
    hess: Tensor = field(init=False)
    grad: Tensor | None = None  # set for an accumulate or step where a launch's addresses do not do
    summed: bool = False  # grad_sum and second_sum hold earlier MC samples of this step

    def __post_init__(self) -> None:
        self.mean, self.momentum, self.hess = (self.view(getattr(self.arena, key)) for key in STATE_KEYS)
        self.remember_storage()

    @classmethod
    def of(cls, param: Tensor, name: str, index: int, group: int, arena: Arena, position: int) -> ParamState:
        """The state of a parameter, which may be a DTensor."""
        dtensor = sharding.as_dtensor(param)
        if dtensor is None:
            return cls(param, name, index, group, arena, position)
        shard = sharding.shard_of(dtensor, name)
        return cls(sharding.local(dtensor), name, index, group, arena, position, dtensor, shard)

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of an arena tensor, in its shape."""
        offset = self.arena.offsets[self.position]
        return flat[offset : offset + self.param.numel()].view(self.param.shape)

    @property
    def parameter(self) -> Tensor:
        """What the optimizer was given: it has the gradient and says whether it is trained."""
        return self.param if self.dtensor is None else self.dtensor

    def grad_now(self) -> Tensor | None:
        """The parameter's gradient, of a DTensor the local shard of it."""
        grad = self.parameter.grad
        return grad if grad is None or self.dtensor is None else sharding.local_grad(grad, self.dtensor)

    def belong(self, name: str, group: int, index: int) -> None:
        """Take another place among the parameters."""
        self.name, self.group, self.index = name, group, index

    def take_grad(self, grad: Tensor | None) -> None:
        """Hold a gradient for a launch, or (None) nothing any more."""
        self.grad = grad

    def mark_summed(self, summed: bool) -> None:
        """Note whether `grad_sum` and `second_sum` hold earlier MC samples of this step."""
        self.summed = summed

    def moved(self) -> bool:
        """Whether the parameter's memory or its strides changed."""
        return self.replaced() or (self.param.data_ptr(), self.param.stride()) != (self.address, self.strides)

    def replaced(self) -> bool:
        """Whether a DTensor has another tensor for its local shard."""
        return self.dtensor is not None and sharding.local(self.dtensor) is not self.param

    def remember_storage(self) -> None:
        """Note where the parameter's memory is and how it is laid out."""
        if self.dtensor is not None:
            self.param = sharding.local(self.dtensor)
        self.address = self.param.data_ptr()
        self.strides = self.param.stride()

    @property
    def step(self) -> int:
        """Finished updates. Waits for the device that counts them."""
        return int(self.arena.steps[self.position])

    @property
    def placement(self) -> Shard:
        """`shard`, also for a whole tensor. Elements that are neighbours throughout are one run, of a multiple of 4."""
        numel = self.param.numel()
        shard = self.shard or Shard(0, numel, numel)
        if shard.run < min(numel, shard.pitch):
            return shard
        run = max(4, -(-numel // 4) * 4)
        return Shard(shard.start, run, run)

    @property
    def noise(self) -> Tensor | None:
        """Kept normals of the last training sample, in the parameter's shape, or None."""
        return None if self.arena.noise is None else self.view(self.arena.noise)

    @property
    def sums(self) -> tuple[Tensor, Tensor] | None:
        """Gradient sum and Hessian-statistic sum over the finished MC samples, in the parameter's shape, or None."""
        arena = self.arena
        if not self.summed or arena.grad_sum is None or arena.second_sum is None:
            return None
        return self.view(arena.grad_sum), self.view(arena.second_sum)

    def set_state(self, saved: Mapping[str, Any] | None, hess_init: float) -> None:
        """Copy a saved state, or start from the parameter as it is."""
        if saved is None:
            self.start_over(hess_init)
            self.mean.copy_(self.param.detach())
            return
        self.arena.steps[self.position] = int(saved["step"])
        for key in STATE_KEYS:
            getattr(self, key).copy_(self.local(saved[key]))

    def start_over(self, hess_init: float) -> None:
        """Forget what was learned, but for the mean."""
        self.arena.steps[self.position] = 0
        self.momentum.zero_()
        self.hess.fill_(hess_init)

    def local(self, value: Tensor) -> Tensor:
        """A tensor that users give, as this state holds it: of a DTensor the local shard."""
        return sharding.localize(value, self.dtensor)

    def state(self) -> dict[str, Any]:
        """What ``optimizer.state[param]`` holds: DTensors for a DTensor."""
        return {
            "step": self.arena.steps[self.position],
            **{key: self.outside(getattr(self, key)) for key in STATE_KEYS},
        }

    def outside(self, value: Tensor) -> Tensor:
        """A tensor of this state as users see it: in the placement of the parameter."""
        return value if self.dtensor is None else sharding.like(value, self.dtensor)

    def adopt_edits(self) -> None:
        """Take weights that were edited from outside (while they held the mean) over as the new mean."""
        weights = self.param.detach()
        # Compared in the weights' dtype: a bfloat16 weight is not edited because the mean has more bits.
        edited = self.mean.to(weights.dtype) != weights
        if bool(edited.any()):
            torch.where(edited, weights.to(self.mean.dtype), self.mean, out=self.mean)
