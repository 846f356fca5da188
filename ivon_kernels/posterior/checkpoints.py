"""From an optimizer, or from its checkpoint, to the Gaussians of a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivon_kernels import checkpoint as checkpoints
from ivon_kernels import hyperparameters, sharding
from ivon_kernels.gaussians import names
from ivon_kernels.gaussians.gaussian import Gaussian

if TYPE_CHECKING:
    from ivon_kernels.optimizer import IVON

__all__ = ["from_checkpoint", "from_optimizer"]


def _whole(value: Tensor) -> Tensor:
    """A copy of a state tensor; of a DTensor all of it, for which its ranks communicate."""
    distributed = sharding.as_dtensor(value)
    value = value if distributed is None else distributed.full_tensor()
    return value.detach().clone(memory_format=torch.contiguous_format)


def _named(model: nn.Module, adapter: str | None) -> dict[Tensor, str]:
    return {param: name for name, param in names.weight_names(model, adapter).items()}


def from_optimizer(optimizer: IVON, model: nn.Module, adapter: str | None) -> dict[str, Gaussian]:
    """See :meth:`ivon_kernels.IVON.posterior`."""
    known = _named(model, adapter)
    found: dict[str, Gaussian] = {}
    index = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            if state is not None:
                if param not in known:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} that the optimizer trains is not in the model"
                        f"{'' if adapter is None else f' or belongs to another adapter than {adapter!r}'}: "
                        "pass the model that is trained"
                    )
                found[known[param]] = Gaussian(
                    _whole(state["mean"]),
                    _whole(state["hess"]),
                    index,
                    float(group["ess"]),
                    float(group["weight_decay"]),
                )
            index += 1
    if not found:
        raise ValueError("the optimizer has no trained parameters, so there is no posterior")
    return found


def from_checkpoint(
    checkpoint: Mapping[str, Any] | str | Path,
    model: nn.Module,
    params: list[nn.Parameter] | None,
    adapter: str | None,
    seed: int,
) -> tuple[dict[str, Gaussian], int]:
    """See :meth:`ivon_kernels.posterior.Posterior.from_checkpoint`. Returns the Gaussians and the seed."""
    state_dict = _read(checkpoint)
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not groups or not isinstance(state_dict.get("state"), dict):
        raise ValueError("this is no optimizer state dict: it lacks 'state' or 'param_groups'")
    ivon_opt = checkpoints.is_ivon_opt(state_dict)
    needed = ("ess", "weight_decay") if ivon_opt else (*hyperparameters.GROUP_KEYS, "seed")
    if lacks := [key for key in ("params", *needed) if any(key not in group for group in groups)]:
        raise ValueError(f"the state dict's parameter groups lack {lacks}: it was saved by another optimizer")
    own_groups = _parameter_groups(groups, params or _trained(groups, model, adapter))
    known = _named(model, adapter)
    if ivon_opt:
        # Only the momentum depends on the step count, which ivon-opt does not save; a posterior has none.
        state_dict = {**state_dict, "state": {**state_dict["state"], "current_step": 0}}
        state_dict = checkpoints.from_ivon_opt(state_dict, own_groups)
    else:
        described = {p: known.get(p, f"a parameter of shape {tuple(p.shape)}") for g in own_groups for p in g["params"]}
        checkpoints.check(state_dict, own_groups, described)
        seed = int(groups[0]["seed"])
    saved = checkpoints.by_parameter(state_dict, own_groups)
    found: dict[str, Gaussian] = {}
    index = 0
    for settings, group in zip(groups, own_groups, strict=True):
        for param in group["params"]:
            if param in saved:
                if param not in known:
                    raise ValueError(f"a parameter of shape {tuple(param.shape)} in `params` is not in the model")
                state, dtype = saved[param], torch.float64 if param.dtype == torch.float64 else torch.float32
                mean, hess = (_whole(state[key]).to(dtype) for key in ("mean", "hess"))
                ess, weight_decay = float(settings["ess"]), float(settings["weight_decay"])
                found[known[param]] = Gaussian(mean, hess, index, ess, weight_decay)
            index += 1
    return found, seed


def _read(checkpoint: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"{checkpoint} holds a {type(loaded).__name__}, not an optimizer's state dict")
    return loaded


def _trained(groups: list[dict[str, Any]], model: nn.Module, adapter: str | None) -> list[nn.Parameter]:
    """The parameters that a state dict is about, in its order."""
    inner = names.unwrap(model)
    saved_names = [name for group in groups for name in group.get("param_names", ())]
    own = dict(inner.named_parameters())
    if saved_names and all(name in own for name in saved_names):
        return [own[name] for name in saved_names]
    trained = [param for param in own.values() if param.requires_grad]
    if not trained and names.adapter_name(inner, adapter) is not None:
        of_adapter = {id(param) for param in names.adapter_weights(inner, adapter).values()}
        trained = [param for param in own.values() if id(param) in of_adapter]
    return trained


def _parameter_groups(saved: list[dict[str, Any]], params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The saved groups' settings with the model's parameters."""
    sizes = [len(group["params"]) for group in saved]
    if sum(sizes) != len(params):
        raise ValueError(
            f"the state dict has {sum(sizes)} parameters, and {len(params)} were found in the model: pass those that "
            "the optimizer was given, in its order (params=...)"
        )
    groups, rest = [], list(params)
    for group, size in zip(saved, sizes, strict=True):
        own = {key: value for key, value in group.items() if key != "params"}
        groups.append({**own, "params": rest[:size]})
        rest = rest[size:]
    return groups
