"""The interface of a method: what it trains, what it keeps, and how it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job

Hyper = Mapping[str, float]
"""Hyperparameters by name."""
State = dict[str, Tensor]
"""What predictions need beside the adapter's weights; counted as the method's extra parameters."""


class Method(ABC):
    """One way of finetuning and predicting. The name of its file is its name.

    The harness calls :meth:`train` in a model whose adapter is at the start that the seed gives, keeps the adapter's
    weights and the state, and calls :meth:`predict` with both in place, also in a later process. A method with a `base`
    trains nothing of its own: it predicts from what the base has trained, with the base's hyperparameters.
    """

    title: ClassVar[str]
    """In tables and plots."""
    source: ClassVar[str]
    """Where it is described: a paper, equation or section."""
    ablation: ClassVar[bool] = False
    """Whether it is here to take something away from IVON, not as a way that anyone would choose."""
    base: ClassVar[str | None] = None
    """The method whose trained weights and state this one takes."""
    candidates: ClassVar[Sequence[Hyper]] = ({},)
    """What training may use, the most promising first: one run each on the validation split, at most `BUDGET`."""
    dials: ClassVar[Sequence[Hyper]] = ({},)
    """Settings that need no training; chosen for every trained model on the validation split, at most `DIAL_BUDGET`."""

    @property
    def name(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    def train(self, job: Job, hyper: Hyper) -> State:
        """Finetune the job's model.

        Args:
            job: Model, data and seed.
            hyper: One of the candidates.

        Returns:
            What :meth:`predict` needs beside the adapter's weights.
        """
        raise NotImplementedError(f"{type(self).__name__} trains nothing of its own")

    def fit(self, job: Job, state: State, hyper: Hyper) -> State:
        """After training, or on what the base has trained: whatever predictions need from the training examples.

        Returns:
            The state that :meth:`predict` gets.
        """
        return state

    @abstractmethod
    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Class probabilities of every example, in their order.

        Args:
            job: Model, with the trained weights in place, which have to be there again afterwards; and the seed.
            state: What training and :meth:`fit` returned.
            hyper: The hyperparameters of the training, and the dials over them.
            examples: To predict.

        Returns:
            float64 ``[examples, classes]``.
        """

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        """Choose the dials for a trained model, by the negative log-likelihood on the validation split.

        Args:
            job: As in :meth:`predict`; with fewer samples.
            state: As there.
            hyper: The hyperparameters of the training.
            validation: The validation split, with labels.

        Returns:
            The chosen ones of the dials alone.
        """
        if len(self.dials) == 1:
            return self.dials[0]
        costs = [job.nll(self.predict(job, state, {**hyper, **dial}, validation), validation) for dial in self.dials]
        return self.dials[costs.index(min(costs))]
