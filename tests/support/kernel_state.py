"""What kernels walk, built by hand: parameters in arenas, groups, device flags and the launch over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivon_kernels.backends import Backend, Launch
from ivon_kernels.backends.state import Arena, DeviceFlags, ParamState
from ivon_kernels.hyperparameters import GroupScalars

GROUP: dict[str, Any] = {
    "lr": 0.1,
    "ess": 50.0,
    "hess_init": 0.5,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.01,
    "hess_approx": "price",
    "clip_radius": float("inf"),
    "debias": True,
    "rescale_lr": True,
    "mc_samples": 1,
    "sync": False,
    "seed": 1,
    "capturable": False,
}


class KernelState:
    """Parameters of one device and their state, which is zero.

    Args:
        backend: Launched on them.
        params: In the order of `slots`. They keep their memory.
        groups: Hyperparameters.
        group_of: The group of each parameter.
        indices: Of each parameter in the noise.
        arenas: How many share the parameters, taking turns.
    """

    def __init__(
        self,
        backend: Backend,
        params: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        *,
        group_of: Sequence[int],
        indices: Sequence[int],
        arenas: int = 1,
    ) -> None:
        self.backend, self.params, self.groups = backend, list(params), list(groups)
        self.device = params[0].device
        self.flags = DeviceFlags(self.device)
        self.rows = GroupScalars()
        self.rows.update(self.groups)
        turns = [range(start, len(params), arenas) for start in range(arenas)]
        self.arenas = [
            Arena([params[i].numel() for i in turn], self.device, torch.float32, flags=self.flags) for turn in turns
        ]
        self.slots = [
            ParamState(p, f"p{i}", indices[i], group_of[i], self.arenas[i % arenas], i // arenas)
            for i, p in enumerate(self.params)
        ]
        self.list = Launch(backend, self.slots, self.rows)

    def set_grads(self, grads: Sequence[Tensor | None]) -> None:
        """What the next accumulate or step reads."""
        for slot, grad in zip(self.slots, grads, strict=True):
            slot.grad = grad
        if self.list.addresses is not None:
            self.list.addresses.set_grads(grads)
