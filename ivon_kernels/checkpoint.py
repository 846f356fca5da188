"""State dicts: exact restoration, clear refusals, and ivon-opt's format."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ivon_kernels import hyperparameters
from ivon_kernels.backends.state import STATE_KEYS

_IVON_OPT_ONLY = ("numel", "momentum", "hess")


def is_ivon_opt(state_dict: dict[str, Any]) -> bool:
    """Whether a state dict has the layout of ivon-opt 0.1.3: flat momentum and hess inside each group."""
    groups = state_dict.get("param_groups", ())
    return bool(groups) and all(key in group for group in groups for key in _IVON_OPT_ONLY)


def _converged_step(beta1: float) -> int:
    """The smallest step count at which the bias correction is 1 in float32."""
    # beta1^t <= 2^-25 is half a unit in the last place of 1.0: 1 - beta1^t rounds to 1.
    return 0 if beta1 == 0 else math.ceil(math.log(2.0**-25) / math.log(beta1))


def from_ivon_opt(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert a state dict of ivon-opt 0.1.3.

    ivon-opt saves neither the mean (it is what the weights hold) nor its step count. Put the count into
    ``state_dict["state"]["current_step"]`` if you have it; otherwise the momentum counts as already converged, so that
    no bias correction is applied twice, and a warning says so.

    Args:
        state_dict: As ivon-opt's ``state_dict()`` returned it.
        param_groups: The loading optimizer's groups; the parameters must hold the mean.

    Raises:
        ValueError: If the sizes differ, or it was saved between a sample and its step.
    """
    saved_groups = state_dict["param_groups"]
    if state_dict["state"].get("count", 0):
        raise ValueError("this ivon-opt state dict was saved between sampled_params and step; save it after step()")
    if len(saved_groups) != len(param_groups):
        raise ValueError(f"this ivon-opt state dict has {len(saved_groups)} groups, the optimizer {len(param_groups)}")
    step: int | None = state_dict["state"].get("current_step")
    if step is None and any(bool(torch.any(group["momentum"] != 0)) for group in saved_groups):
        warnings.warn(
            "ivon-opt does not save its step count: the momentum is taken as converged (no bias correction). To keep "
            "the correction set state_dict['state']['current_step'] to the optimizer's current_step.",
            stacklevel=3,
        )
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for number, (saved, own) in enumerate(zip(saved_groups, param_groups, strict=True)):
        params: list[Tensor] = own["params"]
        sizes = [param.numel() for param in params]
        if sum(sizes) != saved["numel"]:
            raise ValueError(
                f"group {number} of the ivon-opt state dict has {saved['numel']} elements, the optimizer's {sum(sizes)}"
            )
        converged = _converged_step(float(saved["beta1"])) if bool(torch.any(saved["momentum"] != 0)) else 0
        pieces = zip(params, saved["momentum"].split(sizes), saved["hess"].split(sizes), saved["params"], strict=True)
        for param, momentum, hess, key in pieces:
            state[key] = {
                "step": torch.tensor(converged if step is None else step, dtype=torch.int64),
                "mean": param.detach().clone(),
                "momentum": momentum.reshape(param.shape),
                "hess": hess.reshape(param.shape),
            }
        group = {key: value for key, value in own.items() if key != "params"}
        group.update({key: value for key, value in saved.items() if key in group and key != "mc_samples"})
        groups.append({**group, "params": saved["params"]})
    return {"state": state, "param_groups": groups}


def check(state_dict: dict[str, Any], param_groups: list[dict[str, Any]], names: dict[Tensor, str]) -> None:
    """Refuse a state dict that does not fit, before anything is changed.

    Raises:
        ValueError: Saying which parameter's state is missing something or has another shape.
    """
    if not isinstance(state_dict.get("state"), dict) or not isinstance(state_dict.get("param_groups"), list):
        raise ValueError("this is no optimizer state dict: it lacks 'state' or 'param_groups'")
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in param_groups]:
        raise ValueError(
            "the state dict has parameter groups of "
            f"{[len(group['params']) for group in saved_groups]} parameters, the optimizer of "
            f"{[len(group['params']) for group in param_groups]}"
        )
    for saved, own in zip(saved_groups, param_groups, strict=True):
        # "param_names" comes and goes with named parameters; "capturable" is how an optimizer runs, not what it knows.
        missing = [key for key in own if key not in saved and key not in ("params", "param_names", "capturable")]
        if missing:
            raise ValueError(f"the state dict's parameter groups lack {missing}: it was saved by another optimizer")
        hyperparameters.validate(saved, "a saved parameter group")
        for key, param in zip(saved["params"], own["params"], strict=True):
            entry = state_dict["state"].get(key)
            if entry is None:
                continue
            lacks = [name for name in ("step", *STATE_KEYS) if name not in entry]
            if lacks:
                raise ValueError(f"the saved state of {names[param]} lacks {lacks}: it was saved by another optimizer")
            if int(entry["step"]) < 0:
                raise ValueError(f"the saved step of {names[param]} is {int(entry['step'])}")
            for name in STATE_KEYS:
                shape = tuple(getattr(entry[name], "shape", ("no tensor",)))
                if shape != tuple(param.shape):
                    raise ValueError(
                        f"the saved {name} of {names[param]} has shape {shape}, the parameter {tuple(param.shape)}"
                    )


def by_parameter(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The saved state of each parameter that has one."""
    return {
        param: state_dict["state"][key]
        for saved, own in zip(state_dict["param_groups"], param_groups, strict=True)
        for key, param in zip(saved["params"], own["params"], strict=True)
        if key in state_dict["state"]
    }
