"""What several methods do to the adapter for the length of a block: other weights, noise on them, another dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.quality.job import Job

TRAINING, PREDICTION = 1, 2
"""Which noise a generator is for; the two are unrelated, and both unrelated to the adapter's start and the batches."""


def generator(job: Job, stream: int) -> torch.Generator:
    """Noise on the job's device that its seed and the stream decide."""
    return torch.Generator(device=job.device).manual_seed(1_000_003 * stream + job.seed)


def weights(job: Job) -> Tensor:
    """A copy of the adapter's weights, float32 ``[weights]``, in the order of `job.parameters`."""
    return torch.cat([parameter.detach().float().flatten() for parameter in job.parameters])


@torch.no_grad()
def write(job: Job, values: Tensor) -> None:
    """Copies weights ``[weights]``, ordered as :func:`weights` has them, into the adapter."""
    parts = values.split([parameter.numel() for parameter in job.parameters])
    for parameter, part in zip(job.parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


@contextmanager
def holding(job: Job, values: Tensor) -> Iterator[None]:
    """The adapter holds other weights ``[weights]`` inside the block, and its own again, in their dtype, after it."""
    own = [parameter.detach().clone() for parameter in job.parameters]
    write(job, values)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(job.parameters, own, strict=True):
                parameter.copy_(value)


@contextmanager
def dropping_out(job: Job, rate: float) -> Iterator[None]:
    """The adapter's dropout, and nothing else, is on inside the block, at a rate between 0 and 1."""
    adapted = (module for module in job.model.modules() if isinstance(module, LoraLayer))
    layers = [layer for module in adapted for layer in module.lora_dropout.values() if isinstance(layer, nn.Dropout)]
    before = [(layer.p, layer.training) for layer in layers]
    for layer in layers:
        layer.p = rate
        layer.train()
    try:
        yield
    finally:
        for layer, (own_rate, training) in zip(layers, before, strict=True):
            layer.p = own_rate
            layer.train(training)
