"""How outputs of a model move with its weights: gradients at a posterior's mean, weighed by its variances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ivon_kernels import sharding
from ivon_kernels.gaussians.gaussians import Gaussians

__all__ = ["Influence"]


class Influence:
    """What outputs ``f [K]`` of one example have to do with the weights of a posterior.

    With the Jacobian ``J [K, P]`` of the outputs by the ``P`` weights of the posterior, at its mean,

        V  =  J diag(1 / (h + d)) J^T        [K, K]

    which is the covariance of the outputs, to first order, under the posterior of one example (``ess = 1``). Under a
    posterior of ``ess`` it is ``V / ess``.

    Args:
        posterior: The Gaussians.
        model: The model that they are about; :meth:`at_mean` puts the mean into it.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.

    Raises:
        ValueError: If the model does not fit, or its weights are sharded.
        RuntimeError: If the adapter is merged, disabled or not active.
    """

    def __init__(self, posterior: Gaussians, model: nn.Module, *, adapter: str | None = None) -> None:
        self._posterior, self._model, self._adapter = posterior, model, adapter
        gaussians, params = posterior.places_in(model, adapter)
        if sharded := [name for name, param in params.items() if sharding.as_dtensor(param) is not None]:
            raise ValueError(f"{sharded[0]} is a DTensor: gradients of single examples are taken of whole weights only")
        self._params = list(params.values())
        # One weight of the posterior may be in several places of a model, apart: its gradient is their sum.
        self._places: dict[int, list[int]] = {}
        for position, gaussian in enumerate(gaussians.values()):
            self._places.setdefault(gaussian.index, []).append(position)
        by_index = {gaussian.index: gaussian for gaussian in gaussians.values()}
        self._spread = {}
        for index, positions in self._places.items():
            precision = by_index[index].hess + by_index[index].weight_decay
            self._spread[index] = precision.reciprocal().flatten().to(self._params[positions[0]].device)

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
        for index, spread in self._spread.items():
            rows = torch.stack([gradient[index] for gradient in gradients])
            total += ((rows * spread) @ rows.T).cpu().double()
        return total

    def _gradient(self, output: Tensor, *, last: bool) -> dict[int, Tensor]:
        """Of one output by every weight of the posterior, flat, in the dtype of its variances."""
        found = torch.autograd.grad(output, self._params, retain_graph=not last, allow_unused=True)
        result = {}
        for index, positions in self._places.items():
            spread = self._spread[index]
            parts = [part for position in positions if (part := found[position]) is not None]
            total = torch.zeros_like(spread)
            for part in parts:
                total += part.flatten().to(spread)
            result[index] = total
        return result
