"""A posterior in a model: samples are put into the weights by the optimizer's own kernels, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ivon_kernels import sharding
from ivon_kernels.backends import Draw, choose
from ivon_kernels.backends.state import Arena, DeviceFlags, ParamState, state_dtype
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.hyperparameters import GroupScalars
from ivon_kernels.noise import EVAL_STEP
from ivon_kernels.weights import Selection, Weights

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

    def __init__(self, gaussians: Mapping[str, Gaussian], params: Mapping[str, Tensor], backend: str | None) -> None:
        """Copy the Gaussians to where the parameters are.

        Args:
            gaussians: By name.
            params: A tensor for each name, of the same shape, on any device; DTensors too.
            backend: As for :class:`ivon_kernels.IVON`.
        """
        self._params = {name: params[name] for name in gaussians}
        self._ids = {id(param) for param in params.values()}  # of tensors that `_params` keeps alive
        precisions = {(gaussian.ess, gaussian.weight_decay): 0 for gaussian in gaussians.values()}
        self._groups = {precision: number for number, precision in enumerate(precisions)}
        states: list[ParamState] = []
        buckets: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, param in self._params.items():
            buckets.setdefault((param.device, state_dtype(param.dtype)), []).append(name)
        # What inference_mode makes can never be written outside of it, and a placement outlives the block that made it.
        with torch.inference_mode(False), torch.no_grad():
            for (device, dtype), names in buckets.items():
                states += self._fill(self._arena(device, dtype, names, backend), names, gaussians)
        scalars = GroupScalars()
        scalars.update([{**_UNUSED, "ess": ess, "weight_decay": decay} for ess, decay in self._groups])
        self._selection = Selection(states, scalars, backend)
        self._weights = Weights("posterior.sampled(): leave that block first")

    def _arena(self, device: torch.device, dtype: torch.dtype, names: list[str], backend: str | None) -> Arena:
        params = [self._params[name] for name in names]
        on_device = any(choose(backend, param.device, param.dtype).on_device for param in params)
        sizes = [sharding.memory(param).numel() for param in params]
        return Arena(sizes, device, dtype, trained=False, flags=DeviceFlags(device) if on_device else None)

    def _fill(self, arena: Arena, names: list[str], gaussians: Mapping[str, Gaussian]) -> list[ParamState]:
        states = []
        for position, name in enumerate(names):
            gaussian = gaussians[name]
            group = self._groups[gaussian.ess, gaussian.weight_decay]
            state = ParamState.of(self._params[name], name, gaussian.index, group, arena, position)
            state.mean.copy_(sharding.localize(gaussian.mean, state.dtensor))
            state.hess.copy_(sharding.localize(gaussian.hess, state.dtensor))
            states.append(state)
        return states

    def serves(self, params: Iterable[Tensor]) -> bool:
        """Whether this placement's parameters are among these, in the memory where they were."""
        return self._ids.issubset(map(id, params)) and not self._selection.moved(trained=False)

    @contextmanager
    def sample(self, seed: int, sample: int) -> Iterator[None]:
        """Hold a sample in the parameters for the length of a block; what they held comes back, bit for bit.

        Raises:
            RuntimeError: If they hold a sample of somebody else.
        """
        with self._weights.borrowed(self._selection):
            self.put(seed, sample)
            yield

    @contextmanager
    def mean(self) -> Iterator[None]:
        """Hold the mean in the parameters for the length of a block; likewise."""
        with self._weights.borrowed(self._selection):
            self.put_mean()
            yield

    def put(self, seed: int, sample: int) -> None:
        """Weights <- mean + sigma eps, for good."""
        self._weights.write(self._selection, Draw(seed, sample, step=EVAL_STEP))

    def put_mean(self) -> None:
        """Weights <- mean, for good."""
        self._weights.write(self._selection, None)
