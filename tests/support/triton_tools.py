"""Two sets of equal parameters, one for the Triton backend under the interpreter, one for the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Triton reads this when the kernels' module is imported, which the backend does at its first launch.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

from ivon_kernels.backends import Backend, Draw, Guard
from ivon_kernels.backends.reference import ReferenceBackend
from ivon_kernels.backends.triton import TritonBackend
from tests.support.kernel_state import GROUP, KernelState

STATE = ("mean", "momentum", "hess")

Place = Callable[[Tensor], Tensor]


def contiguous(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def unaligned(values: Tensor) -> Tensor:
    """One element past a 16-byte boundary."""
    return torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape).copy_(values)


def transposed(values: Tensor) -> Tensor:
    return torch.empty(values.shape[::-1], dtype=values.dtype).permute(*range(values.dim())[::-1]).copy_(values)


def gapped(values: Tensor) -> Tensor:
    """Every second element of a larger tensor."""
    return torch.empty(*values.shape, 2, dtype=values.dtype)[..., 1].copy_(values)


@dataclass(frozen=True)
class Spec:
    """A parameter: its shape, dtype and place in memory, and those of its gradient (None: it has none)."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None  # the parameter's
    place: Place = contiguous
    grad_place: Place | None = contiguous
    group: int = 0
    index: int = 0


class Side(KernelState):
    """Parameters and state of one backend."""

    def __init__(self, backend: Backend, specs: Sequence[Spec], groups: Sequence[dict[str, Any]], arenas: int) -> None:
        params = [spec.place(_normal(spec.shape, 10 + i).to(spec.dtype)) for i, spec in enumerate(specs)]
        super().__init__(
            backend,
            [param.requires_grad_() for param in params],
            groups,
            group_of=[spec.group for spec in specs],
            indices=[spec.index or 3 * i for i, spec in enumerate(specs)],
            arenas=arenas,
        )
        for i, slot in enumerate(self.slots):
            slot.mean.copy_(slot.param.detach())
            if slot.param.dtype != torch.float32:  # bits that the weights do not hold
                slot.mean.mul_(1 + 2.0**-14)
            slot.momentum.copy_(0.1 * _normal(slot.mean.shape, 50 + i))
            slot.hess.copy_(0.5 + 0.1 * _normal(slot.mean.shape, 90 + i).abs())
            slot.arena.steps[slot.position] = i

    def state(self) -> list[Tensor]:
        parts = [getattr(slot, key) for slot in self.slots for key in STATE]
        sums = [total for slot in self.slots if slot.sums is not None for total in slot.sums]
        return [*(param.detach() for param in self.params), *parts, *(arena.steps for arena in self.arenas), *sums]


class Twins:
    """Does everything on both sides and compares the bits."""

    def __init__(
        self,
        specs: Sequence[Spec],
        groups: Sequence[dict[str, Any]] = (GROUP,),
        arenas: int = 1,
        backend: Backend | None = None,
    ) -> None:
        self.specs, self.groups = specs, groups
        self.triton = Side(backend or TritonBackend(), specs, groups, arenas)
        self.reference = Side(ReferenceBackend(), specs, groups, arenas)
        self.sides = (self.triton, self.reference)
        self.grads: list[Tensor | None] = []
        self.scalars()

    def scalars(self, amp_scale: float = 1.0, samples: int = 1) -> None:
        for side in self.sides:
            side.rows.update(self.groups, amp_scale, samples)

    def new_grads(self, seed: int = 0, scale: float = 1.0) -> None:
        """The same gradients for both; Triton's where the specs say."""
        for side in self.sides:
            grads: list[Tensor | None] = []
            for i, spec in enumerate(self.specs):
                values = scale * _normal(spec.shape, 1000 + 10 * seed + i)
                values = values.to(spec.grad_dtype or spec.dtype)
                grads.append(None if spec.grad_place is None else spec.grad_place(values))
            side.set_grads(grads)

    def edit(self) -> None:
        """Change every second weight from outside."""
        for side in self.sides:
            for param in side.params:
                param.detach().copy_(torch.where(torch.arange(param.numel()).view(param.shape) % 2 == 0, param, 1.25))

    def clear_sums(self) -> None:
        for side in self.sides:
            for arena in side.arenas:
                arena.clear_sums()
            for slot in side.slots:
                slot.summed = True
            side.list.summed = True

    def sample(self, draw: Draw, adopt: bool = False) -> None:
        for side in self.sides:
            side.backend.sample(side.list, draw, adopt)
        self.compare()

    def restore(self) -> None:
        for side in self.sides:
            side.backend.restore(side.list)
        self.compare()

    def accumulate(self, draw: Draw) -> None:
        for side in self.sides:
            side.backend.accumulate(side.list, draw)
        self.compare()

    def step(self, draw: Draw, adopt: bool = False, draw_next: bool = False, guard: Guard = Guard()) -> None:  # noqa: B008
        self.triton.backend.step(self.triton.list, draw, adopt, draw_next, guard)  # type: ignore[call-arg]
        self.reference.backend.step(self.reference.list, draw, adopt, draw_next)
        self.compare()
        assert self.triton.flags.block.tolist()[:2] == [2**62, 0]

    def compare(self) -> None:
        for ours, theirs in zip(self.triton.state(), self.reference.state(), strict=True):
            assert torch.equal(ours, theirs), (ours - theirs).abs().max()
        for arena in self.triton.arenas:  # between the tensors nothing was written
            used = torch.zeros(arena.mean.numel(), dtype=torch.bool)
            for slot in self.triton.slots:
                if slot.arena is arena:
                    begin = arena.offsets[slot.position]
                    used[begin : begin + slot.param.numel()] = True
            for key in STATE:
                assert bool((getattr(arena, key)[~used] == 0).all())


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))
