"""The interface of a method: the job that it gets, and what it trains, keeps and predicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.finetune import train as training
from benchmarks.finetune.data import Batch, EncodedExamples
from benchmarks.finetune.scorers import Scorer

PREDICTION_BATCH = 32  # examples of a forward pass at prediction
TRAINING, PREDICTION = 1, 2
"""Which noise a generator is for; the two are unrelated, and both unrelated to the adapter's start and the batches."""

Hyper = Mapping[str, float]  # hyperparameters by name
State = dict[str, Tensor]
"""What predictions need beside the adapter's weights; counted as the method's extra parameters."""


@dataclass
class Job:
    """A model with one LoRA adapter, a task's examples, and one seed."""

    model: peft.PeftModel
    scorer: Scorer  # class logits [batch, classes] of a batch
    training_set: EncodedExamples
    seed: int  # of the adapter's start, the batches, dropout and noise
    steps: int  # that training may take
    batch_size: int
    samples: int  # that a prediction averages, of methods that sample
    guard: training.InterruptGuard
    note: Callable[[str], None] = lambda text: None  # told what is being done, a few times a second
    passes: int = 0  # examples that went through the model at prediction so far

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's, in the model's order."""
        return training.trainable(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parameters[0].device

    def generator(self, stream: int) -> torch.Generator:
        """Noise on the job's device that its seed and the stream decide."""
        return torch.Generator(device=self.device).manual_seed(1_000_003 * stream + self.seed)

    def restart(self, seed: int | None = None) -> None:
        """Puts the adapter back to its start, which depends on the seed alone; None is the job's."""
        torch.manual_seed(self.seed if seed is None else seed)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)  # type: ignore[no-untyped-call]

    def finetune(
        self, optimizer: torch.optim.Optimizer, *, seed: int | None = None, **hooks: Callable[..., Any]
    ) -> None:
        """Trains the adapter for the job's steps; IVON's samples are drawn here.

        The seed is that of batches and dropout, None the job's; the hooks `around`, `schedule` and `after_step` are
        those of :func:`benchmarks.finetune.train.train`.
        """
        seed, count = self.seed if seed is None else seed, itertools.count(1)
        training.train(
            optimizer,
            self.model,
            lambda batch: training.cross_entropy(self.scorer, batch),
            self.training_set.epochs(self.batch_size, seed),
            steps=self.steps,
            seed=seed,
            guard=self.guard,
            on_step=lambda loss: self.note(f"step {next(count)} of {self.steps}, loss {loss:.3f}"),
            **hooks,
        )
        self.guard.check()

    def batches(self, examples: EncodedExamples, batch_size: int = PREDICTION_BATCH) -> Iterator[Batch]:
        """Every example once, short ones first; `index` of a batch says which ones."""
        for batch in examples.in_length_order(batch_size):
            self.guard.check()
            self.passes += len(batch.index)
            self.note(f"{self.passes} predictions")
            yield batch

    @torch.no_grad()
    def logits(self, examples: EncodedExamples, *, evaluating: bool = True) -> Tensor:
        """Class logits float64 ``[examples, classes]``; unless `evaluating`, the model's modes stay as they are."""
        if evaluating:
            self.model.eval()
        found = [(batch.index, self.scorer(batch).double().cpu()) for batch in self.batches(examples)]
        order = torch.tensor([i for index, _ in found for i in index]).argsort()
        return torch.cat([logits for _, logits in found])[order]

    def each(self, examples: EncodedExamples, sampled: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """Class probabilities float64 ``[samples, examples, classes]`` under samples that blocks of `sampled` hold."""
        found = []
        self.model.eval()
        for _ in range(self.samples):
            with sampled():
                found.append(self.logits(examples, evaluating=False).softmax(1))
        return torch.stack(found)

    def weights(self) -> Tensor:
        """A copy of the adapter's weights, float32 ``[weights]``, in the order of `parameters`."""
        return torch.cat([parameter.detach().float().flatten() for parameter in self.parameters])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Copies weights ``[weights]``, ordered as :meth:`weights` has them, into the adapter."""
        parts = values.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        """The adapter holds other weights ``[weights]`` inside the block, and its own again after it."""
        own = self.weights()  # float32 holds every value of a narrower dtype
        self.write(values)
        try:
            yield
        finally:
            self.write(own)

    @contextmanager
    def dropping_out(self, rate: float) -> Iterator[None]:
        """The adapter's dropout, and nothing else, is on inside the block, at a rate between 0 and 1."""
        adapted = (module for module in self.model.modules() if isinstance(module, LoraLayer))
        layers = [
            layer for module in adapted for layer in module.lora_dropout.values() if isinstance(layer, nn.Dropout)
        ]
        before = [(layer.p, layer.training) for layer in layers]
        for layer in layers:
            layer.p = rate
            layer.train()
        try:
            yield
        finally:
            for layer, (own_rate, mode) in zip(layers, before, strict=True):
                layer.p = own_rate
                layer.train(mode)


def nll(probabilities: Tensor, examples: EncodedExamples) -> float:
    """Mean negative log-likelihood of the examples' labels, in nats."""
    return nn.functional.nll_loss(probabilities.clamp_min(1e-300).log(), examples.labels).item()


@dataclass(frozen=True)
class Method:
    """One way of finetuning and predicting.

    The harness calls :meth:`train` in a model whose adapter is at the start that the seed gives, keeps the adapter's
    weights and the state, and calls :meth:`predict` with both in place, also in a later process. A method with a `base`
    trains nothing of its own: it predicts from what the base has trained, with the base's hyperparameters.
    """

    name: str  # in options and records
    title: str  # in tables and plots
    source: str  # where it is described: a paper, equation or section
    base: str | None = None
    like: str | None = None  # trains with the hyperparameters that were chosen for this method
    sampling: ClassVar[bool] = False  # whether a prediction averages the job's samples
    scaled: ClassVar[bool] = False  # rows with a temperature alone: those without one are its base's
    ablation: bool = False  # here to take something away from IVON, not as a way that anyone would choose
    candidates: Sequence[Hyper] = ({},)  # for training, the most promising first: one run each on the validation split
    long_candidates: Sequence[Hyper] = ()  # the same for runs of many epochs, where other settings are promising
    dials: Sequence[Hyper] = ({},)  # need no training; chosen for every trained model on the validation split

    def train(self, job: Job, hyper: Hyper) -> State:
        """Finetunes the job's model with one of the candidates; returns what :meth:`predict` needs beside it."""
        raise NotImplementedError(f"{self.name} trains nothing of its own")

    def fit(self, job: Job, state: State, hyper: Hyper) -> State:
        """After training: whatever predictions need from the training examples; returns the state for them."""
        return state

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Class probabilities, float64 ``[samples, examples, classes]``, with the dials over `hyper`.

        The first k are what k samples say: their mean is the prediction of k. The job's model has the trained weights
        in place, and has to have them afterwards. Here these predict alone.
        """
        return job.logits(examples).softmax(1)[None]

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Class probabilities of every example, float64 ``[examples, classes]``: the mean over all samples."""
        return self.each(job, state, hyper, examples).mean(0)

    def calibration(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> tuple[Tensor, Tensor]:
        """What temperatures are fitted to: probabilities as :meth:`each` has them, and labels int64 ``[examples]``."""
        return self.each(job, state, hyper, validation), validation.labels

    def work(self, samples: int) -> tuple[int, int]:
        """Trainings that it does itself, and forward passes of a test example; of a job with so many samples."""
        return int(self.base is None), samples if self.sampling else 1

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        """The dials, and nothing else, of the best likelihood on the validation split; `job` has fewer samples."""
        if len(self.dials) == 1:
            return self.dials[0]
        costs = [nll(self.predict(job, state, {**hyper, **dial}, validation), validation) for dial in self.dials]
        return self.dials[costs.index(min(costs))]
