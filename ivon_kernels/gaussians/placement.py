"""A posterior in a model: samples are put into the weights by the optimizer's own kernels, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ivon_kernels import holders, sharding
from ivon_kernels.backends import DeviceFlags, Draw, choose
from ivon_kernels.backends.state import Arena, ParamState, by_backend, state_dtype
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.hyperparameters import GroupScalars
from ivon_kernels.noise import EVAL_STEP

__all__ = ["Placement"]

# Scalars that sampling does not look at.
_UNUSED = {
    "lr": 0.0,
    "hess_init": 1.0,
    "beta1": 0.0,
    "beta2": 0.0,
    "hess_approx": "price",
    "clip_radius": 1.0,
    "debias": False,
    "rescale_lr": False,
}


class Placement:
    """Gaussians and the tensors that take their samples, which hold something else in between."""

    held_by = "posterior.sampled(): leave that block first"

    def __init__(self, gaussians: Mapping[str, Gaussian], params: Mapping[str, Tensor], backend: str | None) -> None:
        """Copy the Gaussians to where the parameters are.

        Args:
            gaussians: By name.
            params: A tensor for each name, of the same shape, on any device; DTensors too.
            backend: As for :class:`ivon_kernels.IVON`.
        """
        self._rows = GroupScalars()
        self._groups: dict[tuple[float, float], int] = {}
        self._params = {name: params[name] for name in gaussians}
        self._ids = {id(param) for param in params.values()}  # of tensors that `_params` keeps alive
        self._held = 0
        slots: list[ParamState] = []
        buckets: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, param in self._params.items():
            buckets.setdefault((param.device, state_dtype(param.dtype)), []).append(name)
        # What inference_mode makes can never be written outside of it, and a placement outlives the block that made it.
        with torch.inference_mode(False), torch.no_grad():
            for (device, dtype), names in buckets.items():
                sizes = [sharding.memory(params[name]).numel() for name in names]
                slots += self._fill(Arena(sizes, device, dtype, trained=False), names, gaussians, backend)
        self._rows.update([{**_UNUSED, "ess": ess, "weight_decay": decay} for ess, decay in self._groups])
        self._slots = slots
        self._launches = by_backend(slots, self._rows)
        self._fsdp = sharding.fsdp_modules(self._params.values())
        # Inference tensors have no version counter, and increment_version refuses them.
        self._tracked = [param for param in self._params.values() if not param.is_inference()]

    def _fill(
        self, arena: Arena, names: list[str], gaussians: Mapping[str, Gaussian], backend_name: str | None
    ) -> list[ParamState]:
        slots = []
        for position, name in enumerate(names):
            gaussian, param = gaussians[name], self._params[name]
            group = self._groups.setdefault((gaussian.ess, gaussian.weight_decay), len(self._groups))
            backend = choose(backend_name, param.device, param.dtype)
            if backend.on_device and arena.control is None:
                arena.control = DeviceFlags(param.device)
            slot = ParamState.of(param, name, gaussian.index, group, backend, arena, position)
            slot.mean.copy_(sharding.localize(gaussian.mean, slot.dtensor))
            slot.hess.copy_(sharding.localize(gaussian.hess, slot.dtensor))
            slots.append(slot)
        return slots

    def serves(self, params: Iterable[Tensor]) -> bool:
        """Whether this placement's parameters are among these, in the memory where they were."""
        return self._ids.issubset(map(id, params)) and not any(
            slots.moved(trained=False) for _, slots in self._launches
        )

    def holds_any(self, params: Iterable[Tensor]) -> bool:
        """Whether one of these parameters holds a sample of this placement now."""
        return self._held > 0 and any(id(param) in self._ids for param in params)

    @contextmanager
    def sample(self, seed: int, sample: int) -> Iterator[None]:
        """Hold a sample in the parameters for the length of a block."""
        with self._borrowed():
            self.put(seed, sample)
            yield

    @contextmanager
    def mean(self) -> Iterator[None]:
        """Hold the mean in the parameters for the length of a block."""
        with self._borrowed():
            self.put_mean()
            yield

    def put(self, seed: int, sample: int) -> None:
        """Weights <- mean + sigma eps, for good."""
        draw = Draw(seed, sample, step=EVAL_STEP)
        for backend, slots in self._launches:
            backend.sample(slots, draw, adopt=False)
        self._announce()

    def put_mean(self) -> None:
        """Weights <- mean, for good."""
        for backend, slots in self._launches:
            backend.restore(slots)
        self._announce()

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """What the parameters hold comes back after the block, bit for bit, whatever happens."""
        holders.refuse_others(self, self._params.values())
        before = [slot.param.detach().clone() for slot in self._slots]
        self._held += 1
        holders.hold(self)
        try:
            yield
        finally:
            with torch.no_grad():
                for slot, value in zip(self._slots, before, strict=True):
                    slot.param.detach().copy_(value)
            self._held -= 1
            if not self._held:
                holders.let_go(self)
            self._announce()

    def _announce(self) -> None:
        """The weights were written: autograd sees another version, and FSDP2 gathers them anew."""
        increment_version(self._tracked)
        # autocast caches casts of leaf weights until its outermost region ends, whatever their version.
        torch.clear_autocast_cache()
        for module in self._fsdp:
            module.reshard()
