"""Which modules have to run with samples of the weights, and how each of them can."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ivon_kernels import sharding
from ivon_kernels.gaussians.gaussian import Gaussian

__all__ = ["LoraWeights", "SampledModule", "Weight", "find_modules", "lora_weights"]

# Modules that read the weights of the modules in them without calling these.
_READ_THEIR_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Weight(NamedTuple):
    """A parameter with a posterior, and one place where a module has it."""

    name: str  # in the posterior
    gaussian: Gaussian
    param: nn.Parameter
    owner: nn.Module
    key: str  # in owner._parameters


@dataclass
class SampledModule:
    """The smallest module that can be run with other weights in place."""

    path: str
    module: nn.Module
    weights: list[Weight] = field(default_factory=list)


class LoraWeights(NamedTuple):
    """The two matrices of an adapter on a LoRA layer."""

    adapter: str
    a: Weight
    b: Weight


def find_modules(
    model: nn.Module, params: Mapping[str, nn.Parameter], gaussians: Mapping[str, Gaussian]
) -> list[tuple[SampledModule, LoraWeights | None]]:
    """Attribute every weight of a posterior to the modules that have it.

    That is the module that has a weight, but for the layers of PEFT (each is one module, without the layer that it
    adapts), for parts that their parent does not call, and for containers.

    Args:
        model: The model.
        params: Its parameters by the names that the posterior has for them.
        gaussians: The posterior.

    Returns:
        Each module once, with the two matrices where it is a LoRA linear layer that the kernels can take over.

    Raises:
        ValueError: If a weight is found in no module, or a module cannot be run sample by sample.
    """
    # A module that the model has in two places is exchanged once; a parameter that two modules share is found in both,
    # and so is a container of parameters that two modules share (a vector bank, the tokens of a tied embedding).
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    names = {id(param): name for name, param in params.items()}
    by_path: dict[str, SampledModule] = {}
    found = set()
    for path, owner in modules.items():
        for key, param in owner._parameters.items():
            name = names.get(id(param)) if param is not None else None
            if name is not None and param is not None:
                found.add(name)
                _check_weight(name, param)
                at = _module_path(path, modules)
                at = first.setdefault(id(modules[at]), at)
                sampled = by_path.setdefault(at, SampledModule(at, modules[at]))
                if not any(weight.owner is owner and weight.key == key for weight in sampled.weights):
                    sampled.weights.append(Weight(name, gaussians[name], param, owner, key))
    if missing := sorted(set(params) - found):
        raise ValueError(f"no module of {type(model).__name__} has the posterior's weight {missing[0]!r}: cannot stack")
    return _merge(by_path)


def _check_weight(name: str, param: nn.Parameter) -> None:
    if sharding.as_dtensor(param) is not None:
        raise ValueError(
            f"{name!r} is a DTensor: samples are stacked in unsharded models; use posterior.sampled() here"
        )
    if param.device.type == "meta":
        raise ValueError(f"{name!r} is on the meta device: load or move the model's weights before stacking samples")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _module_path(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Path of the module that has to run with samples of an owner's parameters."""
    at = path
    if ".parametrizations." in f".{path}.":  # called by the parametrized module
        at = f".{path}.".partition(".parametrizations.")[0].strip(".")
    ancestors = [at]
    while ancestors[-1]:
        ancestors.append(_parent(ancestors[-1]))
    for ancestor in reversed(ancestors):
        if isinstance(modules[ancestor], _READ_THEIR_PARTS):
            return _adapting(ancestor, modules)
    for ancestor in ancestors:
        if _is_adapter_layer(modules[ancestor]) and not f"{at}.".startswith(f"{ancestor}.base_layer."):
            return ancestor
    return next(a for a in ancestors if type(modules[a]).forward is not nn.Module.forward or not a)


def _adapting(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The PEFT layer whose base layer this is, or the path itself."""
    parent = _parent(path)
    return parent if path == f"{parent}.base_layer" and _is_adapter_layer(modules[parent]) else path


def _merge(by_path: dict[str, SampledModule]) -> list[tuple[SampledModule, LoraWeights | None]]:
    """Modules inside another one that is run sample by sample become part of it."""
    result: list[tuple[SampledModule, LoraWeights | None]] = []
    whole: list[SampledModule] = []
    for path in sorted(by_path, key=lambda p: (p.count("."), p)):  # outer ones first
        sampled = by_path[path]
        outer = next((w for w in whole if not w.path or path.startswith(f"{w.path}.")), None)
        if outer is not None:
            outer.weights += sampled.weights
            continue
        weights = lora_weights(sampled)
        if weights is None:
            _check_runs_by_sample(sampled)
            whole.append(sampled)
        result.append((sampled, weights))
    return result


def _check_runs_by_sample(sampled: SampledModule) -> None:
    module = sampled.module
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        raise ValueError(
            f"the posterior's weight {sampled.weights[0].name!r} is in no module with a forward(): cannot stack"
        )
    if isinstance(module, nn.RNNBase):
        raise ValueError(f"{sampled.path} ({kind}) has the batch in the second dimension of its state: cannot stack")
    base = getattr(module, "base_layer", module)
    attention = getattr(base, "self_attn", base)
    if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
        raise ValueError(
            f"{sampled.path} ({kind}) has the batch in the second dimension: build it with batch_first=True"
        )


# ---- PEFT ---------------------------------------------------------------------------------------------------------


def _peft(module: str, *names: str) -> list[Any]:
    """What a module of PEFT has under these names; nothing if PEFT was not imported, as then no model is PEFT's."""
    loaded = sys.modules.get(module)
    return [found for name in names if (found := getattr(loaded, name, None)) is not None]


def _is_adapter_layer(module: nn.Module) -> bool:
    return isinstance(module, tuple(_peft("peft.tuners.tuners_utils", "BaseTunerLayer")))


def lora_weights(sampled: SampledModule) -> LoraWeights | None:
    """The matrices of a LoRA linear layer that the kernels can take over; None if the module has to run whole."""
    layer: Any = sampled.module
    kinds = _peft("peft.tuners.lora.layer", "Linear") + _peft("peft.tuners.lora.bnb", "Linear8bitLt", "Linear4bit")
    # By forward(), not by isinstance: a subclass that computes something else has to run whole.
    known = type(layer).forward in [kind.forward for kind in kinds] and "forward" not in vars(layer)
    if not known or len(sampled.weights) != 2:
        return None
    owned = {id(weight.owner): weight for weight in sampled.weights}
    for adapter, factor in layer.lora_A.items():
        a, b = owned.get(id(factor)), owned.get(id(layer.lora_B[adapter]))
        if a is not None and b is not None:
            plain = _plain(a) and _plain(b) and adapter not in layer.lora_variant and a.param.device == b.param.device
            return LoraWeights(adapter, a, b) if plain else None
    return None


def _plain(weight: Weight) -> bool:
    """Whether the owner does nothing but multiply by a matrix that the kernels know."""
    owner = weight.owner
    return (
        type(owner) is nn.Linear
        and owner.bias is None
        and weight.param.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.gaussian.mean.dtype == torch.float32
        and not (owner._forward_hooks or owner._forward_pre_hooks or "forward" in vars(owner))
    )
