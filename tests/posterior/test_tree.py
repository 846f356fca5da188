"""Containers of tensors keep their class and everything in them that is no tensor, whatever kind they are."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutputWithPast

from ivon_kernels.tree import concatenate, map_tensors, tensors


class Pair(NamedTuple):
    first: Tensor
    second: Any


class OwnDict(dict[str, Any]):
    pass


class OwnList(list[Any]):
    pass


class OwnTuple(tuple[Any, ...]):
    pass


T = torch.arange(3.0)


@pytest.mark.parametrize(
    "value",
    [
        {"a": T, "b": "text"},
        OrderedDict(a=T, b=None),
        defaultdict(list, a=T),
        OwnDict(a=T, b=1),
        UserDict(a=T, b=1),
        BatchEncoding({"a": T, "b": [T, 2]}),
        CausalLMOutputWithPast(logits=T),  # type: ignore[arg-type]
        [T, (T, "text")],
        OwnList([T, 1]),
        OwnTuple([T, 1]),
        Pair(T, {"b": 3}),
        MappingProxyType({"a": T}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_container(value: Any) -> None:
    found = map_tensors(lambda tensor: tensor + 1, value)
    joined = concatenate([value, found])
    kind = dict if isinstance(value, MappingProxyType) else type(value)
    assert type(found) is kind and type(joined) is kind
    before, after, both = (list(tensors(each)) for each in (value, found, joined))
    assert before and all(tensor is T for tensor in before)
    assert len(before) == len(after) == len(both)
    assert all(tensor.equal(T + 1) for tensor in after) and all(t.equal(torch.cat([T, T + 1])) for t in both)
    rest = [item for item in _leaves(value) if not isinstance(item, Tensor)]
    assert [item for item in _leaves(found) if not isinstance(item, Tensor)] == rest


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (dict, UserDict, MappingProxyType)):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else [value]


def test_an_attribute_of_an_output_is_its_item() -> None:
    found = map_tensors(lambda tensor: tensor * 2, CausalLMOutputWithPast(logits=T))  # type: ignore[arg-type]
    assert found.logits is found["logits"] and found.logits.equal(2 * T) and found.loss is None


def test_what_is_no_container_stays_as_it_is() -> None:
    for value in (None, "text", 3, deque([T]), {T}):
        assert map_tensors(lambda tensor: tensor + 1, value) is value
        assert list(tensors(value)) == [] and concatenate([value, value]) is value
