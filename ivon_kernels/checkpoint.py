"""State dicts: exact restoration, clear refusals, and ivon-opt's format."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ivon_kernels import hyperparameters, sharding
from ivon_kernels.backends.state import STATE_KEYS
from ivon_kernels.hyperparameters import GROUP_KEYS, OPTIMIZER_KEYS
from ivon_kernels.noise import MAX_SAMPLES, whole_number

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_IVON_OPT_ONLY = ("numel", "momentum", "hess")


def is_ivon_opt(state_dict: dict[str, Any]) -> bool:
    """Whether a state dict has the layout of ivon-opt 0.1.3: flat momentum and hess inside each group."""
    groups = state_dict.get("param_groups", ())
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
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
                "step": torch.tensor(converged if step is None else step, dtype=torch.int64, device="cpu"),
                "mean": param.detach().clone(),
                "momentum": momentum.reshape(param.shape),
                "hess": hess.reshape(param.shape),
            }
        group = {key: value for key, value in own.items() if key != "params"}
        group.update({key: value for key, value in saved.items() if key in group and key != "mc_samples"})
        groups.append({**group, "params": saved["params"]})
    return {"state": state, "param_groups": groups}


def check_entry(entry: Mapping[str, Any], name: str, shape: torch.Size) -> None:
    """Refuse an entry of ``optimizer.state`` or of a state dict that does not fit its parameter.

    Raises:
        ValueError: Saying what is missing or has another shape.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state of {name} is a {type(entry).__name__}, not a dict")
    if lacks := [key for key in ("step", *STATE_KEYS) if key not in entry]:
        raise ValueError(f"the state of {name} lacks {lacks}: it is another optimizer's, or a part of it was deleted")
    step = entry["step"]
    number = isinstance(step, Real) or (isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex())
    if not (number and float(step) >= 0 and float(step).is_integer()):
        raise ValueError(f"the step of {name} is {step!r}, not a whole number")
    for key in STATE_KEYS:
        value = entry[key]
        found = tuple(value.shape) if isinstance(value, Tensor) else "no tensor"
        if found != tuple(shape):
            raise ValueError(f"the {key} of {name} has shape {found}, the parameter {tuple(shape)}")
        if not value.is_floating_point():
            raise ValueError(f"the {key} of {name} has dtype {value.dtype}")
        if not bool(torch.isfinite(sharding.memory(value)).all()):
            raise ValueError(f"the {key} of {name} holds inf or nan")


def fitted(state_dict: dict[str, Any], param_groups: list[dict[str, Any]], names: dict[Tensor, str]) -> dict[str, Any]:
    """A state dict in the order of an optimizer's parameters, with everything that its groups need.

    Args:
        state_dict: IVON's, or ivon-opt's.
        param_groups: The loading optimizer's.
        names: Of its parameters, for messages.

    Raises:
        ValueError: If it does not fit, saying why.
    """
    if is_ivon_opt(state_dict):
        state_dict = from_ivon_opt(state_dict, param_groups)
    _check_form(state_dict)
    state_dict = _by_name(state_dict, param_groups)
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in param_groups]:
        raise ValueError(
            "the state dict has parameter groups of "
            f"{[len(group['params']) for group in saved_groups]} parameters, the optimizer of "
            f"{[len(group['params']) for group in param_groups]}"
        )
    groups = []
    for saved, own in zip(saved_groups, param_groups, strict=True):
        # "capturable" is how an optimizer runs, not what it knows.
        missing = [key for key in (*GROUP_KEYS, *OPTIMIZER_KEYS) if key not in saved and key != "capturable"]
        if missing:
            raise ValueError(f"the state dict's parameter groups lack {missing}: it was saved by another optimizer")
        for key in ("debias", "rescale_lr", "sync", "capturable"):
            if not isinstance(saved.get(key, False), bool | int):
                raise ValueError(f"the saved {key} is {saved[key]!r}, neither True nor False")
        hyperparameters.validate(saved, "a saved parameter group")
        whole_number(saved["seed"], "the saved seed", 0, 2**64)
        whole_number(saved["mc_samples"], "the saved mc_samples", 1, MAX_SAMPLES + 1)
        for key, param in zip(saved["params"], own["params"], strict=True):
            if key in state_dict["state"]:
                check_entry(state_dict["state"][key], names[param], param.shape)
        groups.append({**{key: value for key, value in own.items() if key != "params"}, **saved})
    return {**state_dict, "param_groups": groups}


def _check_form(state_dict: dict[str, Any]) -> None:
    """Refuse what is no optimizer's state dict."""
    groups = state_dict.get("param_groups")
    if not isinstance(state_dict.get("state"), dict) or not isinstance(groups, list):
        raise ValueError("this is no optimizer state dict: it lacks 'state' or 'param_groups'")
    for group in groups:
        keys = group.get("params") if isinstance(group, dict) else None
        if not isinstance(keys, list) or not all(isinstance(key, int | str) for key in keys):
            raise ValueError("a parameter group of the state dict has no list of parameters: it is damaged")
        names = group.get("param_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the param_names of a group of the state dict are no list of names: it is damaged")


def _by_name(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with its parameters in the order of the optimizer's, where both have names; else as it is."""
    saved_groups = state_dict["param_groups"]
    exact = _places(saved_groups, str), _names(param_groups, str)
    # A wrapper of the model may have added its own parts to the names on one side.
    places, own_names = exact if _fit(*exact) else (_places(saved_groups, _unwrapped), _names(param_groups, _unwrapped))
    if places is None or own_names is None or _names(saved_groups, str) == _names(param_groups, str):
        return state_dict
    if not _fit(places, own_names):
        wanted = {name for names in own_names for name in names}
        raise ValueError(
            f"the state dict is of other parameters: it has {_some(set(places) - wanted)}, which the optimizer lacks, "
            f"and lacks {_some(wanted - set(places))}; where both have names (named_parameters()), state goes by name"
        )
    groups = []
    for own, names in zip(param_groups, own_names, strict=True):
        sources = [places[name][0] for name in names] or [own]
        settings = [{key: group[key] for key in group if key not in ("params", "param_names")} for group in sources]
        if any(other != settings[0] for other in settings):
            raise ValueError(
                f"the parameters {_some(names)} of one group were in groups with other settings when the state dict "
                "was saved: group them as they were"
            )
        groups.append({**settings[0], "params": [places[name][1] for name in names], "param_names": own["param_names"]})
    return {**state_dict, "param_groups": groups}


_Places = dict[str, tuple[dict[str, Any], Any]]


def _names(groups: list[dict[str, Any]], as_known: Callable[[str], str]) -> list[list[str]] | None:
    """The parameters' names by group, or None where some have none."""
    if any(len(group.get("param_names") or ()) != len(group["params"]) for group in groups):
        return None
    if not all("param_names" in group for group in groups):  # one without parameters
        return None
    return [[as_known(name) for name in group["param_names"]] for group in groups]


def _places(groups: list[dict[str, Any]], as_known: Callable[[str], str]) -> _Places | None:
    """Each name's group and key, or None where some have no name."""
    names = _names(groups, as_known)
    if names is None:
        return None
    return {
        name: (group, key)
        for group, known in zip(groups, names, strict=True)
        for name, key in zip(known, group["params"], strict=True)
    }


def _fit(places: _Places | None, names: list[list[str]] | None) -> bool:
    if places is None or names is None:
        return False
    return sorted(places) == sorted(name for group in names for name in group)


def _unwrapped(name: str) -> str:
    """A parameter's name in the model itself, whatever wraps it or a part of it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def by_parameter(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The saved state of each parameter that has one."""
    return {
        param: state_dict["state"][key]
        for saved, own in zip(state_dict["param_groups"], param_groups, strict=True)
        for key, param in zip(saved["params"], own["params"], strict=True)
        if key in state_dict["state"]
    }
