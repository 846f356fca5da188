"""Named Gaussians over the weights of a model, which can be put into it: sampled, or at their mean."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ivon_kernels.facts import as_html, as_line
from ivon_kernels.gaussians import dials, names
from ivon_kernels.gaussians.adapters import NO_ORIGIN, Layers, Origin, origin_of, own_adapter
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.placement import Placement
from ivon_kernels.noise import check_sample
from ivon_kernels.training.snapshot import Snapshot

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Gaussians"]

_GLANCE = 2**16  # elements that a repr looks at


class Gaussians(Mapping[str, Gaussian]):
    """Independent Gaussians over the weights of a model, by name: a mapping from names to :class:`Gaussian`.

    An adapter's weights have the names that PEFT saves them by, all others their names in the model. Sample ``k`` is
    the same set of weights at any time, on any device and backend: that of ``optimizer.sampled_params(sample=k)``.

    Args:
        gaussians: By name; the noise indices differ.
        seed: Of the noise, in ``[0, 2^64)``.
        origin: Where in a model they were trained, as far as that is known.

    Attributes:
        seed: As above.
        origin: As above.
    """

    def __init__(self, gaussians: Mapping[str, Gaussian], seed: int, *, origin: Origin = NO_ORIGIN) -> None:
        self._gaussians = dict(gaussians)
        self.seed = seed
        self.origin = origin
        self._placed: _Placed | None = None

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot, model: nn.Module, adapter: str | None = None) -> Self:
        """What an optimizer has learned, by the names that the weights have in a model.

        Args:
            snapshot: Of the optimizer.
            model: The model that it trains, perhaps wrapped by DistributedDataParallel or torch.compile.
            adapter: Which of its PEFT adapters; None for the one that has trained parameters, or the active one.

        Raises:
            ValueError: If a trained parameter is not in the model, or nothing was trained.
        """
        if adapter is None and len(names.adapters(names.unwrap(model))) > 1:
            adapter = own_adapter(model, [weight[0] for weight in snapshot.weights])
        chosen = names.adapter_name(model, adapter)
        known: dict[Tensor, str] = {param: name for name, param in names.weight_names(model, chosen).items()}
        found, params = {}, {}
        for param, mean, hess, index, ess, weight_decay in snapshot.weights:
            if param not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} that the optimizer trains is not in the model"
                    f"{'' if adapter is None else f' or belongs to another adapter than {adapter!r}'}: "
                    "pass the model that is trained"
                )
            found[known[param]] = Gaussian(mean, hess, index, ess, weight_decay)
            params[known[param]] = param
        if not found:
            raise ValueError("the optimizer has no trained parameters, so there is no posterior")
        return cls(found, snapshot.seed, origin=origin_of(model, chosen, params))

    # ---- as a mapping ------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Gaussian:
        """The posterior of one weight tensor."""
        return self._gaussians[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._gaussians)

    def __len__(self) -> int:
        """How many weight tensors there are."""
        return len(self._gaussians)

    def __repr__(self) -> str:
        """Adapter, sizes, sigma and settings."""
        return as_line(type(self).__name__, self.facts())

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self.facts())

    def facts(self) -> dict[str, str]:
        """What a ``repr`` says, by name: adapter, sizes, sigma, settings."""
        facts = {} if self.origin.adapter is None else {"adapter": self.origin.adapter}
        facts |= {"tensors": str(len(self)), "weights": f"{self.numel:,}"}
        if self.numel:
            low, median, high = self._sigma_quantiles()
            facts["sigma"] = f"{median:.3g} (90% from {low:.3g} to {high:.3g})"
            facts["ess"] = ", ".join(f"{ess:.4g}" for ess in sorted({gaussian.ess for gaussian in self.values()}))
        return {**facts, "seed": str(self.seed)}

    def _sigma_quantiles(self) -> list[float]:
        """The 5%, 50% and 95% quantiles, of every so many elements where there are too many for a glance."""
        stride = -(-self.numel // _GLANCE)
        parts = [
            replace(gaussian, mean=gaussian.mean.flatten()[::stride], hess=gaussian.hess.flatten()[::stride])
            for gaussian in self.values()
        ]
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device="cpu")
        found: list[float] = torch.quantile(torch.cat([part.sigma.double().cpu() for part in parts]), levels).tolist()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are placed in models of their own."""
        return {**self.__dict__, "_placed": None}

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return sum(gaussian.mean.numel() for gaussian in self.values())

    @property
    def mean(self) -> dict[str, Tensor]:
        """Means by name, float32 (float64 for float64 weights), in the shapes of the weights."""
        return {name: gaussian.mean for name, gaussian in self.items()}

    @property
    def variance(self) -> dict[str, Tensor]:
        """``sigma^2`` by name, like the means."""
        return {name: gaussian.variance for name, gaussian in self.items()}

    @property
    def sigma(self) -> dict[str, Tensor]:
        """Standard deviations by name, like the means."""
        return {name: gaussian.sigma for name, gaussian in self.items()}

    @property
    def snr(self) -> dict[str, Tensor]:
        """``|mean| / sigma`` by name, like the means."""
        return {name: gaussian.snr for name, gaussian in self.items()}

    @property
    def kl(self) -> dict[str, float]:
        """Kullback-Leibler divergence from the prior by name, in nats; inf where there is no weight decay."""
        return {name: gaussian.kl for name, gaussian in self.items()}

    # ---- in a model --------------------------------------------------------------------------------------------------

    def parameters_of(self, model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Which parameter of a model each Gaussian is about, by the posterior's names.

        Args:
            model: The model, perhaps wrapped by DistributedDataParallel or torch.compile.
            adapter: Which of its PEFT adapters; None for the posterior's own if it is there, else the active one.

        Raises:
            ValueError: If one is missing, or has another shape.
        """
        known = names.weight_names(model, self._adapter_in(model, adapter))
        missing = [name for name in self if name not in known]
        if missing:
            raise ValueError(
                f"the model ({type(model).__name__}) has no {missing[0]!r}, one of {len(missing)} weight tensors of "
                f"this posterior that it lacks: load the adapter or the weights that the posterior was saved with"
            )
        for name, gaussian in self.items():
            if known[name].shape != gaussian.mean.shape:
                raise ValueError(
                    f"{name} has shape {tuple(known[name].shape)} in the model and {tuple(gaussian.mean.shape)} in the "
                    "posterior: it belongs to another model or adapter configuration"
                )
        return {name: known[name] for name in self}

    def places_in(
        self, model: nn.Module, adapter: str | None = None
    ) -> tuple[dict[str, Gaussian], dict[str, nn.Parameter]]:
        """Every place where samples go in a model that runs under them: tied weights may be apart there.

        Args:
            model: The model.
            adapter: Which of its PEFT adapters; None for the posterior's own, or the active one.

        Returns:
            Gaussians and parameters by names: those of this posterior, and aliases whose parameter is another one.

        Raises:
            ValueError: If the model does not fit, or scales the adapter otherwise than where it was trained.
            RuntimeError: If the adapter is merged, disabled or not active, so that samples would have no effect.
        """
        chosen = self._adapter_in(model, adapter)
        gaussians, params = self._places(model, chosen)
        if chosen is not None:
            Layers(model, chosen, params).check(self.origin)
        return gaussians, params

    def _places(self, model: nn.Module, chosen: str | None) -> tuple[dict[str, Gaussian], dict[str, nn.Parameter]]:
        params, known = self.parameters_of(model, chosen), names.weight_names(model, chosen)
        gaussians = dict(self)
        for alias, name in self.origin.aliases.items():
            other = known.get(alias) if name in params else None
            if other is not None and other is not params[name]:
                if other.shape != params[name].shape:
                    raise ValueError(
                        f"{alias} has shape {tuple(other.shape)} in the model, and {name}, with which it was one "
                        f"weight in training, {tuple(params[name].shape)}: it belongs to another model"
                    )
                gaussians[alias], params[alias] = self[name], other
        return gaussians, params

    def _adapter_in(self, model: nn.Module, adapter: str | None) -> str | None:
        """The adapter of a model that is meant: the posterior's own, where no other is named and the model has it."""
        own, inner = self.origin.adapter, names.unwrap(model)
        if adapter is None and own is not None and own in names.adapters(inner) and not names.several_active(inner):
            return own
        return names.adapter_name(model, adapter)

    @contextmanager
    def sampled(
        self, model: nn.Module, sample: int, *, adapter: str | None = None, backend: str | None = None
    ) -> Iterator[None]:
        """Hold a sample in the model's weights for the length of a block.

        What the weights held before is back after it bit for bit, also when the block raises.

        Args:
            model: A model with these weights: the trained one, or one that was loaded.
            sample: Number of the sample, as :func:`ivon_kernels.noise.check_sample` takes it: the same weights
                everywhere.
            adapter: Which of its PEFT adapters; None for the posterior's own if it is there, else the active one.
            backend: What computes the sample, as for :class:`ivon_kernels.IVON`; the bits do not depend on it.

        Raises:
            ValueError: If `sample` is out of range, or the model does not fit.
            RuntimeError: If an optimizer holds a sample in these weights, or the adapter is merged, disabled or not
                active, so that the sample would have no effect.
        """
        check_sample(sample)
        with self._placement(model, adapter, backend, used=True).sample(self.seed, sample):
            yield

    @contextmanager
    def at_mean(self, model: nn.Module, *, adapter: str | None = None, backend: str | None = None) -> Iterator[None]:
        """Hold this posterior's mean in the model's weights for the length of a block, as :meth:`sampled`.

        Of use for a posterior whose mean is not what the model holds: a pruned or merged one.
        """
        with self._placement(model, adapter, backend, used=True).mean():
            yield

    def copy_mean_to(self, model: nn.Module, adapter: str | None = None) -> None:
        """Make this posterior's mean the model's weights, for good.

        Raises:
            ValueError: If the model does not fit.
            RuntimeError: If the adapter is merged into the base weights.
        """
        self._placement(model, adapter, None, used=False).put_mean()

    def draw(self, sample: int, *, backend: str | None = None) -> dict[str, Tensor]:
        """The weights of a sample by name, in the dtype and shape of the means, not rounded to the model's dtype.

        Args:
            sample: Number of the sample, as :func:`ivon_kernels.noise.check_sample` takes it.
            backend: As in :meth:`sampled`.

        Raises:
            ValueError: If `sample` is out of range.
        """
        check_sample(sample)
        weights = {name: torch.empty_like(gaussian.mean) for name, gaussian in self.items()}
        Placement(self, weights, backend).put(self.seed, sample)
        return weights

    # ---- others like this one ----------------------------------------------------------------------------------------

    def tempered(self, temperature: float) -> Self:
        """This posterior with ``ess * temperature``: every variance divided by it.

        Above 1 the posterior is colder and closer to the mean, below 1 warmer.

        Raises:
            ValueError: If it is not a finite number above 0.
        """
        return self._with(dials.tempered(self, temperature))

    def pruned(self, fraction: float) -> Self:
        """This posterior without the weights that say least: magnitude-to-sigma pruning (arXiv 2506.14280).

        The given fraction of all weights, those with the smallest ``|mean| / sigma``, get mean 0 and no noise.

        Raises:
            ValueError: If it is not in ``[0, 1]``.
        """
        return self._with(dials.pruned(self, fraction))

    def to(self, device: torch.device | str) -> Self:
        """This posterior with its tensors on a device."""
        moved = {
            name: replace(gaussian, mean=gaussian.mean.to(device), hess=gaussian.hess.to(device))
            for name, gaussian in self.items()
        }
        return self._with(moved)

    def _with(self, gaussians: Mapping[str, Gaussian]) -> Self:
        """The same but for the Gaussians, whatever a subclass holds beside them."""
        other = copy.copy(self)
        other._gaussians = dict(gaussians)
        return other

    def _placement(self, model: nn.Module, adapter: str | None, backend: str | None, *, used: bool) -> Placement:
        """Where samples of this posterior go in a model; the last one is kept. `used`: the model will run under them.

        Raises:
            ValueError, RuntimeError: As :meth:`places_in`.
        """
        chosen = self._adapter_in(model, adapter)
        placed = self._placed
        if (
            placed is None
            or placed.model() is not model
            or placed.key != (chosen, backend)
            or not placed.placement.serves(names.unwrap(model).parameters())
        ):
            gaussians, params = self._places(model, chosen)
            layers = None if chosen is None else Layers(model, chosen, params)
            placement = Placement(gaussians, params, backend)
            placed = self._placed = _Placed(weakref.ref(model), (chosen, backend), placement, layers)
        if placed.layers is not None and used:
            placed.layers.check(self.origin)
        elif placed.layers is not None:
            placed.layers.refuse_merged()
        return placed.placement


class _Placed(NamedTuple):
    model: weakref.ref[nn.Module]
    key: tuple[str | None, str | None]  # adapter and backend
    placement: Placement
    layers: Layers | None  # of the adapter
