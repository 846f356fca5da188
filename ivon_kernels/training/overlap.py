"""Parameters that share memory, which IVON cannot train: a sample of one would be the mean of the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ivon_kernels import sharding

__all__ = ["refuse_shared"]


def refuse_shared(names: Mapping[Tensor, str]) -> None:
    """Refuse parameters of which two elements are in one place. Slices that only lie between each other are fine.

    Args:
        names: What each parameter, dense, on whatever device, is called in the message.

    Raises:
        ValueError: Naming the two parameters, or the one whose own elements overlap.
    """
    by_device: dict[torch.device, list[tuple[int, int, Tensor, str]]] = {}
    for param, name in names.items():
        memory = sharding.memory(param)
        if memory.numel() == 0:
            continue
        begin = memory.data_ptr()
        end = begin + _reach(memory.shape, memory.stride()) * memory.element_size()
        by_device.setdefault(memory.device, []).append((begin, end, memory, name))
    for places in by_device.values():
        _refuse_on_device(places)


def _refuse_on_device(places: list[tuple[int, int, Tensor, str]]) -> None:
    """Look at parameters in the order of their addresses; only those whose ranges meet are compared by element."""
    places.sort(key=lambda place: place[:2])
    together: list[tuple[int, int, Tensor, str]] = []
    reached = 0
    for place in places:
        if place[0] >= reached:
            _refuse_elements(together)
            together = []
        together.append(place)
        reached = max(reached, place[1])
    _refuse_elements(together)


def _refuse_elements(together: Sequence[tuple[int, int, Tensor, str]]) -> None:
    if not together or (len(together) == 1 and _plainly_apart(together[0][2].shape, together[0][2].stride())):
        return
    # Of tensors without gaps the ranges say it all, however large they are.
    dense = [place for place in together if place[1] - place[0] == place[2].numel() * place[2].element_size()]
    for (_, end, _, one), (begin, _, _, other) in itertools.pairwise(dense):
        if begin < end:
            raise _shared(one, other)
    # Which parameter, from 1, each byte belongs to: exact, as large as the range, and hardly ever needed.
    first = together[0][0]
    owner = torch.zeros(max(end for _, end, _, _ in together) - first, dtype=torch.int32, device="cpu")
    for number, (begin, _, memory, name) in enumerate(together):
        size = memory.element_size()
        shape, stride = (*memory.shape, size), (*(s * size for s in memory.stride()), 1)
        mine = owner.as_strided(shape, stride, begin - first)
        if int(mine.max()):
            raise _shared(together[int(mine.max()) - 1][3], name)
        mine.fill_(number + 1)
        if int((owner == number + 1).sum()) != memory.numel() * size:
            raise ValueError(f"{name} has elements that share memory; give IVON a clone of it")


def _shared(one: str, other: str) -> ValueError:
    return ValueError(
        f"{one} and {other} share memory, so that a sample of one would be in the other: make them one Parameter "
        "(module_b.weight = module_a.weight), clone one, or freeze it"
    )


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _plainly_apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether every dimension steps over all that the smaller ones reach."""
    reach = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step < reach:
            return False
        reach += (size - 1) * step
    return True
