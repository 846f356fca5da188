"""How outputs of a model move with its weights: gradients at a posterior's mean, weighed by its variances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ivon_kernels import sharding
from ivon_kernels.gaussians.gaussians import Gaussians

__all__ = ["Influence"]


class Influence:
    """What outputs ``f [K]`` of one example have to do with the weights of a posterior.

    With the Jacobian ``J [K, P]`` of the outputs by the ``P`` weights of the posterior, at its mean,

        V  =  J S J^T  [K, K]        S = diag(sigma^2) = diag(1 / (ess (h + d)))

    is the covariance of the outputs under the posterior, to first order.

    Args:
        posterior: The Gaussians.
        model: The model that they are about; :meth:`at_mean` puts the mean into it.
        num_data: Takes the place of ess: ``S = diag(1 / (num_data (h + d)))``. None: each Gaussian has its own.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.

    Raises:
        ValueError: If the model does not fit, its weights are sharded, or `num_data` is out of range.
        RuntimeError: If the adapter is merged, disabled or not active.
    """

    def __init__(
        self, posterior: Gaussians, model: nn.Module, *, num_data: float | None = None, adapter: str | None = None
    ) -> None:
        if num_data is not None and not 1 <= num_data < math.inf:
            raise ValueError(f"num_data must be a number of examples, at least 1, got {num_data!r}")
        self._posterior, self._model, self._adapter = posterior, model, adapter
        gaussians, params = posterior.places_in(model, adapter)
        if sharded := [name for name, param in params.items() if sharding.as_dtensor(param) is not None]:
            raise ValueError(f"{sharded[0]} is a DTensor: gradients of single examples are taken of whole weights only")
        self._params = list(params.values())
        # One weight of the posterior may be in several places of a model, apart: its gradient is their sum.
        self._places: dict[int, list[int]] = {}
        for position, gaussian in enumerate(gaussians.values()):
            self._places.setdefault(gaussian.index, []).append(position)
        self._variance: dict[int, Tensor] = {}
        for gaussian, param in zip(gaussians.values(), self._params, strict=True):
            counted = gaussian if num_data is None else replace(gaussian, ess=float(num_data))
            self._variance[gaussian.index] = counted.variance.flatten().to(param.device)

    @contextmanager
    def at_mean(self) -> Iterator[None]:
        """The mean in the model's weights, and gradients by them, for the length of a block."""
        frozen = [param for param in self._params if not param.requires_grad]
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._posterior.at_mean(self._model, adapter=self._adapter),
        ):
            for param in frozen:
                param.requires_grad_(True)
            try:
                yield
            finally:
                for param in frozen:
                    param.requires_grad_(False)

    def covariance(self, outputs: Tensor) -> Tensor:
        """``V`` of outputs that were computed under :meth:`at_mean`, by as many backward passes.

        Args:
            outputs: ``[K]``, with their graph, which is freed.

        Returns:
            float64 ``[K, K]`` on the CPU.
        """
        gradients = [self._gradient(output, last=i == len(outputs) - 1) for i, output in enumerate(outputs)]
        total = torch.zeros(len(outputs), len(outputs), dtype=torch.float64, device="cpu")
        for index, variance in self._variance.items():
            rows = torch.stack([gradient[index] for gradient in gradients])
            total += ((rows * variance) @ rows.T).cpu().double()
        return total

    def _gradient(self, output: Tensor, *, last: bool) -> dict[int, Tensor]:
        """Of one output by every weight of the posterior, flat, in the dtype of its variances."""
        found = torch.autograd.grad(output, self._params, retain_graph=not last, allow_unused=True)
        result = {}
        for index, positions in self._places.items():
            result[index] = torch.zeros_like(self._variance[index])
            for position in positions:
                if (part := found[position]) is not None:
                    result[index] += part.flatten().to(result[index])
        return result
