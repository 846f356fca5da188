"""What a prediction is made for: one batch, or an iterable of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ivon_kernels.noise import MAX_SAMPLES, MIRROR
from ivon_kernels.tree import map_tensors, tensors


class Labelled(NamedTuple):
    """A batch whose labels were split off."""

    inputs: Any  # what the score function gets
    labels: Tensor | None  # int64 [rows], on the CPU
    rows: int


def batches_of(inputs: Any) -> tuple[Iterable[Any], int | None]:
    """The batches in `inputs`, and how many they are where that is known.

    A tensor, a mapping or a tuple is one batch; anything else is iterated over.

    Raises:
        TypeError: If it is neither a batch nor an iterable of batches.
    """
    if isinstance(inputs, (Tensor, Mapping, tuple)):
        return (inputs,), 1
    if isinstance(inputs, torch.utils.data.Dataset) or not isinstance(inputs, Iterable) or isinstance(inputs, str):
        raise TypeError(
            f"inputs must be a batch (a tensor, a dict of tensors, or a tuple of inputs and labels) or an iterable of "
            f"batches such as a DataLoader, got {type(inputs).__name__}"
        )
    # Not len(): of a DataLoader over an IterableDataset it raises TypeError, which length_hint takes for "unknown".
    return inputs, operator.length_hint(inputs) or None


def split_labels(batch: Any) -> Labelled:
    """Take the labels out of a batch: ``batch["labels"]`` of a mapping, the second item of a pair.

    Raises:
        TypeError: If it is no batch.
        ValueError: If it has no tensors, or its labels are not one class for each row.
    """
    labels = None
    if isinstance(batch, Mapping):
        inputs: Any = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        inputs = batch[0]
        labels = batch[1] if len(batch) == 2 else None
    elif isinstance(batch, Tensor):
        inputs = batch
    else:
        raise TypeError(
            f"a batch must be a tensor, a dict of tensors, or a pair of inputs and labels, got {_describe(batch)}"
        )
    found = list(tensors(inputs))
    if not found or not found[0].dim():
        raise ValueError(
            f"the batch has no tensors with rows: {_describe(batch)}; a DataLoader makes batches of examples"
        )
    rows = found[0].shape[0]
    if labels is not None:
        labels = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
        if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels must be one class number for each of the batch's {rows} rows, got {labels.dtype} of shape "
                f"{list(labels.shape)}: leave out labels that a loss needs"
            )
        labels = labels.to("cpu", torch.int64)
    return Labelled(inputs, labels, rows)


def cut(batch: Labelled, rows: int) -> Iterator[Labelled]:
    """The batch in pieces of at most `rows` rows.

    Raises:
        ValueError: If it is larger, and some tensor in it does not have one entry for each row.
    """
    if batch.rows <= rows:
        yield batch
        return
    for tensor in tensors(batch.inputs):
        if not tensor.dim() or tensor.shape[0] != batch.rows:
            raise ValueError(
                f"the batch has {batch.rows} rows, more than max_rows={rows}, and a tensor of shape "
                f"{list(tensor.shape)} in it cannot be cut: give smaller batches or a larger max_rows"
            )
    for start in range(0, batch.rows, rows):
        here = slice(start, start + rows)
        labels = None if batch.labels is None else batch.labels[here]
        yield Labelled(map_tensors(operator.itemgetter(here), batch.inputs), labels, min(rows, batch.rows - start))


def bar(what: str, total: int | None, progress: bool | None) -> tqdm[Any]:
    """A bar over batches, gone when they are done; None hides it for one batch, and where there is no terminal."""
    hidden = (total == 1 or None) if progress is None else not progress
    return tqdm(total=total, desc=what, unit="batch", disable=hidden, leave=False)


def to_device(inputs: Any, device: torch.device) -> Any:
    """The inputs with every tensor on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def sample_numbers(samples: Any) -> tuple[int, ...]:
    """The samples asked for: the first so many, or these; none stands for the mean.

    Raises:
        TypeError, ValueError: If it is no number of samples and no sequence of sample numbers.
    """
    if isinstance(samples, bool) or not isinstance(samples, (int, Iterable)):
        raise TypeError(f"samples must be how many, or the numbers of the samples, got {samples!r}")
    if isinstance(samples, int):
        if not 0 <= samples <= MAX_SAMPLES:
            raise ValueError(f"samples must be from 0 (the mean) to {MAX_SAMPLES}, got {samples}")
        return tuple(range(samples))
    numbers = tuple(map(operator.index, samples))
    if not numbers or not all(0 <= k < 2 * MIRROR for k in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"samples must be different numbers in [0, {2 * MIRROR}), got {list(numbers)}")
    return numbers


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "a dict of " + (
            ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items()) or "nothing"
        )
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return type(batch).__name__
