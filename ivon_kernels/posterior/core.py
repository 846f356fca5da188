"""The trained posterior: a Gaussian for every weight tensor, by name, without the optimizer that found it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivon_kernels.gaussians import dials, names
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.placement import Placement
from ivon_kernels.noise import MAX_SAMPLES
from ivon_kernels.posterior import file, hub
from ivon_kernels.predict import generation, prediction

if TYPE_CHECKING:
    from ivon_kernels.optimizer import IVON

__all__ = ["Posterior"]


class Posterior(Mapping[str, Gaussian]):
    """What IVON has learned about the weights of a model: independent Gaussians, by name.

    A mapping from names to :class:`Gaussian`. An adapter's weights have the names that PEFT saves them by, all others
    their names in the model. Made by :meth:`ivon_kernels.IVON.posterior`, :meth:`load` or :meth:`from_checkpoint`::

        model.save_pretrained(folder)
        optimizer.posterior(model).save(folder)

        model = PeftModel.from_pretrained(base, folder)  # in another process
        posterior = Posterior.load(folder)
        prediction = posterior.predict(model, inputs, samples=10)

    Sample ``k`` of a posterior is the same set of weights at any time, on any device and backend: that of
    ``optimizer.sampled_params(sample=k)``.

    Args:
        gaussians: By name; the noise indices differ.
        seed: Of the noise, in ``[0, 2^64)``.
        folder: Where weights and posterior are saved together, or None.

    Attributes:
        seed: As above.
        folder: As above; set by :meth:`save` and :meth:`load`.
    """

    def __init__(self, gaussians: Mapping[str, Gaussian], seed: int, folder: Path | None = None) -> None:
        self._gaussians = dict(gaussians)
        self.seed = seed
        self.folder = folder
        self._placed: tuple[weakref.ref[nn.Module], tuple[str | None, str | None], Placement] | None = None

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
        """Sizes and settings."""
        ess = sorted({gaussian.ess for gaussian in self.values()})
        return f"Posterior({len(self)} tensors, {self.numel:,} weights, ess {ess}, seed {self.seed})"

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

    # ---- from and to files -------------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Mapping[str, Any] | str | Path,
        model: nn.Module,
        *,
        params: list[nn.Parameter] | None = None,
        adapter: str | None = None,
        seed: int = 0,
    ) -> Posterior:
        """The posterior in a state dict of IVON, or of ivon-opt 0.1.3.

        Args:
            checkpoint: The optimizer's state dict, or a file of torch.save that holds it, such as a Trainer
                checkpoint's optimizer.pt.
            model: The model that was trained. For a state dict of ivon-opt, which has no mean, its weights must hold
                the mean.
            params: The parameters that the optimizer was given, in order. None: found by name where the state dict has
                names, else those that require a gradient; of a model loaded for inference, those of the adapter.
            adapter: Which of the model's adapters; None for the active one.
            seed: Of the noise, for a state dict of ivon-opt, which has none.

        Raises:
            ValueError: If it is no such state dict, or does not fit the parameters.
        """
        from ivon_kernels.posterior.checkpoints import from_checkpoint

        return cls(*from_checkpoint(checkpoint, model, params, adapter, seed))

    @classmethod
    def of_optimizer(cls, optimizer: IVON, model: nn.Module, adapter: str | None = None) -> Posterior:
        """See :meth:`ivon_kernels.IVON.posterior`."""
        from ivon_kernels.posterior.checkpoints import from_optimizer

        return cls(from_optimizer(optimizer, model, adapter), optimizer.seed)

    def save(self, folder: str | Path) -> None:
        """Write ivon_posterior.safetensors into the folder of the saved model or adapter.

        Save the model first: ``model.save_pretrained(folder)``, at the mean. The file holds float32 mean and Hessian
        of every tensor (8 bytes a weight) under PEFT's key names, and in its metadata ess, weight decay, seed, versions
        and a hash of the weights beside it. An older file is replaced at once, never half written.

        Args:
            folder: Made if it is not there. Without saved weights in it the posterior is written alone, and compared
                with the weights that are there when it is loaded.

        Raises:
            ValueError: If the weights in the folder are not this posterior's mean.
            OSError: If it cannot be written.
        """
        file.save(self, Path(folder))
        self.folder = Path(folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None) -> Posterior:
        """Read what :meth:`save` wrote; bit for bit the same means, variances and samples.

        Args:
            folder: A local folder, or a repository on the Hugging Face hub, which is downloaded to its cache.
            device: Where to put it.
            revision: Of the repository.

        Raises:
            FileNotFoundError: If there is no ivon_posterior.safetensors in the folder.
            PosteriorFileError: If it is damaged or incomplete, or not saved with the weights that are beside it.
        """
        folder = hub.snapshot(folder, revision)
        return cls(*file.load(folder, device), folder=folder)

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload posterior") -> str:
        """Upload the saved posterior to a repository that has its adapter: after ``model.push_to_hub(repo_id)``.

        Returns:
            Where the commit is.

        Raises:
            ValueError: If it was not saved yet.
        """
        return hub.push(self.folder, repo_id, commit_message)

    def sample_adapter(self, sample: int, folder: str | Path | None = None) -> Path:
        """Write one sample as an ordinary adapter (or model) folder, for everything that knows nothing of posteriors.

        The sample has the bits that :meth:`sampled` puts into weights of the saved dtype. Configuration and tokenizer
        files come along.

        Args:
            sample: Number of the sample, in ``[0, 65536)``.
            folder: Where to write; made if it is not there. None: ``sample_K`` in the posterior's own folder.

        Returns:
            The folder.

        Raises:
            ValueError: If this posterior was neither saved nor loaded, or the folder is its own.
            PosteriorFileError: If the weights that it was saved with are not there any more.
        """
        _check_sample(sample)
        return file.save_sample(self, sample, folder)

    # ---- in a model --------------------------------------------------------------------------------------------------

    def parameters_of(self, model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Which parameter of a model each Gaussian is about, by the posterior's names.

        Args:
            model: The model, perhaps wrapped by DistributedDataParallel or torch.compile.
            adapter: Which of its PEFT adapters; None for the active one.

        Raises:
            ValueError: If one is missing, or has another shape.
        """
        known = names.weight_names(model, adapter)
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

    @contextmanager
    def sampled(
        self, model: nn.Module, sample: int, *, adapter: str | None = None, backend: str | None = None
    ) -> Iterator[None]:
        """Hold a sample in the model's weights for the length of a block.

        What the weights held before is back after it bit for bit, also when the block raises.

        Args:
            model: A model with these weights: the trained one, or one that was loaded.
            sample: Number of the sample, in ``[0, 65536)``: the same weights everywhere.
            adapter: Which of its PEFT adapters; None for the active one.
            backend: What computes the sample, as for :class:`ivon_kernels.IVON`; the bits do not depend on it.

        Raises:
            ValueError: If `sample` is out of range, or the model does not fit.
            RuntimeError: If an optimizer holds a sample in these weights.
        """
        _check_sample(sample)
        with self._placement(model, adapter, backend).sample(self.seed, sample):
            yield

    @contextmanager
    def at_mean(self, model: nn.Module, *, adapter: str | None = None, backend: str | None = None) -> Iterator[None]:
        """Hold this posterior's mean in the model's weights for the length of a block, as :meth:`sampled`.

        Of use for a posterior whose mean is not what the model holds: a pruned or merged one.
        """
        with self._placement(model, adapter, backend).mean():
            yield

    def copy_mean_to(self, model: nn.Module, adapter: str | None = None) -> None:
        """Make this posterior's mean the model's weights, for good.

        Raises:
            ValueError: If the model does not fit.
        """
        self._placement(model, adapter, None).put_mean()

    def draw(self, sample: int, *, backend: str | None = None) -> dict[str, Tensor]:
        """The weights of a sample by name, in the dtype and shape of the means, not rounded to the model's dtype.

        Args:
            sample: Number of the sample, in ``[0, 65536)``.
            backend: As in :meth:`sampled`.

        Raises:
            ValueError: If `sample` is out of range.
        """
        _check_sample(sample)
        weights = {name: torch.empty_like(gaussian.mean) for name, gaussian in self.items()}
        Placement(self, weights, backend).put(self.seed, sample)
        return weights

    predict = prediction.predict
    generate = generation.generate
    generate_averaged = generation.generate_averaged

    # ---- others like this one ----------------------------------------------------------------------------------------

    def tempered(self, temperature: float) -> Posterior:
        """This posterior with ``ess * temperature``: every variance divided by it.

        Above 1 the posterior is colder and closer to the mean, below 1 warmer.

        Raises:
            ValueError: If it is not a finite number above 0.
        """
        return self._with(dials.tempered(self, temperature))

    def pruned(self, fraction: float) -> Posterior:
        """This posterior without the weights that say least: magnitude-to-sigma pruning (arXiv 2506.14280).

        The given fraction of all weights, those with the smallest ``|mean| / sigma``, get mean 0 and no noise.

        Raises:
            ValueError: If it is not in ``[0, 1]``.
        """
        return self._with(dials.pruned(self, fraction))

    def to(self, device: torch.device | str) -> Posterior:
        """This posterior with its tensors on a device."""
        moved = {
            name: replace(gaussian, mean=gaussian.mean.to(device), hess=gaussian.hess.to(device))
            for name, gaussian in self.items()
        }
        return self._with(moved)

    def _with(self, gaussians: Mapping[str, Gaussian]) -> Posterior:
        return Posterior(gaussians, self.seed, self.folder)

    def _placement(self, model: nn.Module, adapter: str | None, backend: str | None) -> Placement:
        """Where samples of this posterior go in a model; the last one is kept."""
        chosen = names.adapter_name(model, adapter)
        if self._placed is not None:
            of, key, placement = self._placed
            if of() is model and key == (chosen, backend) and placement.serves(names.unwrap(model).parameters()):
                return placement
        placement = Placement(self, self.parameters_of(model, chosen), backend)
        self._placed = weakref.ref(model), (chosen, backend), placement
        return placement


def _check_sample(sample: int) -> None:
    if not (isinstance(sample, int) and 0 <= sample < MAX_SAMPLES):
        raise ValueError(f"sample must be a whole number in [0, {MAX_SAMPLES}), got {sample!r}")
