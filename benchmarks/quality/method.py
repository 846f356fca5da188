"""The interface of a method: what it trains, what it keeps, and how it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job

Hyper = Mapping[str, float]
"""Hyperparameters by name."""
State = dict[str, Tensor]
"""What predictions need beside the adapter's weights; counted as the method's extra parameters."""


@dataclass(frozen=True)
class Method(ABC):
    """One way of finetuning and predicting.

    The harness calls :meth:`train` in a model whose adapter is at the start that the seed gives, keeps the adapter's
    weights and the state, and calls :meth:`predict` with both in place, also in a later process. A method with a `base`
    trains nothing of its own: it predicts from what the base has trained, with the base's hyperparameters.

    Attributes:
        name: In options and records.
        title: In tables and plots.
        source: Where it is described: a paper, equation or section.
        base: The method whose trained weights and state this one takes.
        ablation: Whether it is here to take something away from IVON, not as a way that anyone would choose.
        candidates: What training may use, the most promising first: one run each on the validation split, at most
            `BUDGET`.
        dials: Settings that need no training; chosen for every trained model on the validation split, at most
            `DIAL_BUDGET`.
    """

    name: str
    title: str
    source: str
    base: str | None = None
    ablation: bool = False
    candidates: Sequence[Hyper] = ({},)
    dials: Sequence[Hyper] = ({},)

    def train(self, job: Job, hyper: Hyper) -> State:
        """Finetunes the job's model with one of the candidates; returns what :meth:`predict` needs beside it."""
        raise NotImplementedError(f"{self.name} trains nothing of its own")

    def fit(self, job: Job, state: State, hyper: Hyper) -> State:
        """After training: whatever predictions need from the training examples; returns the state for them."""
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
        """The dials, and nothing else, of the best likelihood on the validation split; `job` has fewer samples."""
        if len(self.dials) == 1:
            return self.dials[0]
        costs = [job.nll(self.predict(job, state, {**hyper, **dial}, validation), validation) for dial in self.dials]
        return self.dials[costs.index(min(costs))]
