"""From the state dict of an optimizer, IVON or ivon-opt, to what a posterior needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivon_kernels import checkpoint as checkpoints
from ivon_kernels import hyperparameters
from ivon_kernels.gaussians import names
from ivon_kernels.training.snapshot import Snapshot, snapshot

__all__ = ["snapshot_of"]


def snapshot_of(
    checkpoint: Mapping[str, Any] | str | Path,
    model: nn.Module,
    params: list[nn.Parameter] | None,
    adapter: str | None,
    seed: int,
) -> Snapshot:
    """See :meth:`ivon_kernels.posterior.Posterior.from_checkpoint`."""
    state_dict = _read(checkpoint)
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not groups or not isinstance(state_dict.get("state"), dict):
        raise ValueError("this is no optimizer state dict: it lacks 'state' or 'param_groups'")
    ivon_opt = checkpoints.is_ivon_opt(state_dict)
    needed = ("ess", "weight_decay") if ivon_opt else (*hyperparameters.GROUP_KEYS, "seed")
    if lacks := [key for key in ("params", *needed) if any(key not in group for group in groups)]:
        raise ValueError(f"the state dict's parameter groups lack {lacks}: it was saved by another optimizer")
    own_groups = _parameter_groups(groups, params or _trained(groups, model, adapter))
    known = {param: name for name, param in names.weight_names(model, adapter).items()}
    if ivon_opt:
        # Only the momentum depends on the step count, which ivon-opt does not save; a posterior has none.
        state_dict = {**state_dict, "state": {**state_dict["state"], "current_step": 0}}
        state_dict = checkpoints.from_ivon_opt(state_dict, own_groups)
    else:
        described = {p: known.get(p, f"a parameter of shape {tuple(p.shape)}") for g in own_groups for p in g["params"]}
        state_dict = checkpoints.fitted(state_dict, own_groups, described)
        seed = int(groups[0]["seed"])
    saved = checkpoints.by_parameter(state_dict, own_groups)
    for param in saved:
        if param not in known:
            raise ValueError(f"a parameter of shape {tuple(param.shape)} in `params` is not in the model")
    return snapshot(own_groups, saved, seed)


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
