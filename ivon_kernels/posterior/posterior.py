"""The trained posterior: a Gaussian for every weight tensor, by name, without the optimizer that found it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivon_kernels.gaussians.adapters import NO_ORIGIN, Origin
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.noise import check_sample
from ivon_kernels.posterior import checkpoints, exporting, file, hub
from ivon_kernels.predict import generation, left_out, prediction
from ivon_kernels.report import page

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Posterior"]


class Posterior(Gaussians):
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

    :class:`~ivon_kernels.gaussians.gaussians.Gaussians` puts it into models. :meth:`predict`, :meth:`generate`,
    :meth:`generate_averaged`, :meth:`leave_one_out` and :meth:`sensitivity` are the functions of these names in
    :mod:`ivon_kernels.posterior`: one implementation, documented there, which takes any Gaussians.

    Args:
        gaussians: By name; the noise indices differ.
        seed: Of the noise, in ``[0, 2^64)``.
        folder: Where weights and posterior are saved together, or None.
        origin: Where in a model it was trained: adapter, scaling, further names of tied weights.

    Attributes:
        seed: As above.
        folder: As above; set by :meth:`save` and :meth:`load`.
        origin: As above.
    """

    def __init__(
        self,
        gaussians: Mapping[str, Gaussian],
        seed: int,
        folder: Path | None = None,
        *,
        origin: Origin = NO_ORIGIN,
    ) -> None:
        super().__init__(gaussians, seed, origin=origin)
        self.folder = folder

    predict = prediction.predict
    generate = generation.generate
    generate_averaged = generation.generate_averaged
    leave_one_out = left_out.leave_one_out
    sensitivity = left_out.sensitivity

    def report(
        self,
        folder: str | Path,
        predictions: prediction.Prediction | Mapping[str, prediction.Prediction],
        labels: Tensor | None = None,
        *,
        votes: Tensor | None = None,
        title: str = page.TITLE,
    ) -> Path:
        """Write a page about predictions and this posterior: :func:`ivon_kernels.posterior.report`.

        Args:
            folder: Where to write; made if it is not there.
            predictions: One, or several of the same examples by name.
            labels: int ``[N]``, the right classes; None takes those of the predictions.
            votes: ``[N, C]``, how many people chose each class of each example.
            title: Heading of the page.

        Returns:
            The page, ``report.md`` in the folder.

        Raises:
            TypeError, ValueError, ModuleNotFoundError: As there.
        """
        named = {"prediction": predictions} if isinstance(predictions, prediction.Prediction) else predictions
        return page.report(folder, named, labels, self, votes=votes, title=title)

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
    ) -> Self:
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
        found = checkpoints.snapshot_of(checkpoint, model, params, adapter, seed)
        return cls.of_snapshot(found, model, adapter)

    def save(self, folder: str | Path) -> None:
        """Write ivon_posterior.safetensors into the folder of the saved model or adapter.

        Save the model first: ``model.save_pretrained(folder)``, at the mean. The file holds float32 mean and Hessian
        of every tensor (8 bytes a weight) under PEFT's key names, and in its metadata ess, weight decay, seed, versions
        and a hash of the weights beside it. An older file is replaced at once, never half written.

        Args:
            folder: Made if it is not there. Without saved weights in it the posterior is written alone, and compared
                with the weights that are there when it is loaded.

        Raises:
            ValueError: If the weights in the folder are not this posterior's mean, or PEFT saves something that was
                made of them instead (a converted adapter, p-tuning).
            OSError: If it cannot be written.
        """
        file.save(self, Path(folder))
        self.folder = Path(folder)

    def save_with_mean(self, folder: str | Path, *, source: str | Path | None = None) -> None:
        """Write this posterior beside weights that are its mean: a merged, pruned or tempered one, without a model.

        Args:
            folder: Where to write; made if it is not there, and without a posterior so far.
            source: Whose saved weights, configuration and tokenizer are written with it, the weights of this posterior
                replaced by its mean. None: its own folder.

        Raises:
            ValueError: If there is no source, or a posterior in the folder.
            PosteriorFileError: If the weights in `source` lack one of this posterior's, or it has another shape there.
        """
        file.save_with_mean(self, self.folder if source is None else Path(source), Path(folder))
        self.folder = Path(folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None) -> Self:
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
        gaussians, seed, origin = file.load(folder, device)
        return cls(gaussians, seed, folder, origin=origin)

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
            sample: Number of the sample, as :func:`ivon_kernels.noise.check_sample` takes it.
            folder: Where to write; made if it is not there. None: ``sample_K`` in the posterior's own folder.

        Returns:
            The folder.

        Raises:
            ValueError: If this posterior was neither saved nor loaded, or the folder is its own.
            PosteriorFileError: If the weights that it was saved with are not there any more.
        """
        check_sample(sample)
        return file.save_sample(self, sample, self.folder, folder)

    def export(self, folder: str | Path, samples: int | Sequence[int] = 8, *, source: str | Path | None = None) -> Path:
        """Write the mean and samples as PEFT adapters with a manifest, for a server that holds several adapters.

        The folder gets ``mean``, ``sample_0``, ... and ``ivon_samples.json``, which has for each of them the fields
        ``name``, ``path`` (relative to the folder) and ``base_model_name`` that vLLM's ``--lora-modules`` takes, and
        the number of the sample. :mod:`ivon_kernels.integrations.serving` averages over what is served.

        Args:
            folder: Where to write; made if it is not there.
            samples: How many, or their numbers (:func:`ivon_kernels.noise.antithetic`); 0 writes the mean alone.
            source: Whose saved adapter, configuration and tokenizer are written with other values. None: the
                posterior's own folder.

        Returns:
            The manifest.

        Raises:
            ValueError: If there is no source, or it holds no adapter.
            PosteriorFileError: If the adapter there does not fit this posterior.
        """
        return exporting.export(self, self.folder if source is None else Path(source), Path(folder), samples)
