"""What a method works with: a model, a task's examples, and one seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.finetune import train as training
from benchmarks.finetune.data import Batch, EncodedExamples
from benchmarks.finetune.model import LabelScorer

PREDICTION_BATCH = 32
"""Examples of a forward pass at prediction."""


@dataclass
class Job:
    """A model, a task's examples, and one seed.

    Attributes:
        model: Causal language model with one LoRA adapter.
        scorer: Gives the class logits ``[batch, classes]`` of a batch.
        training_set: Examples to train on.
        seed: Decides the adapter's start, the batches, dropout and noise.
        steps: Training steps that a method may take.
        batch_size: Examples of a step.
        samples: Samples that a prediction averages, of methods that sample.
        guard: Asked between steps and batches whether Ctrl-C was pressed; it raises Interrupted.
        note: Told what is being done, a few times a second.
        passes: Examples that went through the model at prediction so far.
    """

    model: peft.PeftModel
    scorer: LabelScorer
    training_set: EncodedExamples
    seed: int
    steps: int
    batch_size: int
    samples: int
    guard: training.InterruptGuard
    note: Callable[[str], None] = lambda text: None
    passes: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, in the model's order."""
        return training.trainable(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parameters[0].device

    def restart(self, seed: int | None = None) -> None:
        """Put the adapter back to its start, which depends on the seed alone; None is the job's."""
        torch.manual_seed(self.seed if seed is None else seed)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)  # type: ignore[no-untyped-call]

    def finetune(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[[Batch], Tensor] | None = None,
        seed: int | None = None,
        **hooks: Callable[..., Any],
    ) -> training.Training:
        """Train the adapter: the job's steps, of its batches.

        Args:
            optimizer: Of the parameters; IVON's samples are drawn here.
            loss: Of a batch; None is the cross-entropy.
            seed: Of batches and dropout; None is the job's.
            hooks: `around`, `schedule` and `after_step`, as :func:`benchmarks.finetune.train.train` takes them.
        """
        seed = self.seed if seed is None else seed
        count = itertools.count(1)
        done = training.train(
            optimizer,
            self.model,
            self.cross_entropy if loss is None else loss,
            self.training_set.epochs(self.batch_size, seed),
            steps=self.steps,
            seed=seed,
            guard=self.guard,
            on_step=lambda loss: self.note(f"step {next(count)} of {self.steps}, loss {loss:.3f}"),
            **hooks,
        )
        self.guard.check()
        return done

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the labels under the model as it is, in nats."""
        return training.cross_entropy(self.scorer, batch)

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

    def average(self, examples: EncodedExamples, sampled: Callable[[int], AbstractContextManager[Any]]) -> Tensor:
        """Class probabilities float64 ``[examples, classes]``, the mean over the job's samples.

        ``sampled(k)`` holds sample ``k`` in the model for the length of a block.
        """
        total = torch.zeros((), dtype=torch.float64)
        self.model.eval()
        for sample in range(self.samples):
            with sampled(sample):
                total = total + self.logits(examples, evaluating=False).softmax(1)
        return total / self.samples

    def nll(self, probabilities: Tensor, examples: EncodedExamples) -> float:
        """Mean negative log-likelihood of the examples' labels, in nats."""
        return nn.functional.nll_loss(probabilities.clamp_min(1e-300).log(), examples.labels).item()

    def with_samples(self, samples: int) -> Job:
        """This job with another number of samples."""
        return replace(self, samples=samples)
