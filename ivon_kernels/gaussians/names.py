"""What a model's parameters are called: by PEFT's own key names for adapters, by their names in the model otherwise."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["adapter_name", "adapter_weights", "adapters", "aliases", "several_active", "unwrap", "weight_names"]

_HUB_PREFIX = "base_model.model."  # of PEFT's keys; transformers' own adapters get it when they are saved


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def adapters(model: nn.Module) -> dict[str, Any]:
    """The adapters of a model, from PEFT or from transformers' own integration of it; empty if it has none."""
    # Not imported to find out: that takes seconds, and nobody has adapters before somebody imported PEFT.
    config = getattr(model, "peft_config", None) if "peft" in sys.modules else None
    return config if isinstance(config, dict) else {}


def adapter_name(model: nn.Module, adapter: str | None) -> str | None:
    """The adapter that a posterior is about; None for a model without adapters.

    Args:
        model: The model.
        adapter: A name, or None for the active one.

    Raises:
        ValueError: If there is no such adapter, or several are active and none was named.
    """
    config = adapters(unwrap(model))
    if not config:
        if adapter is not None:
            raise ValueError(f"adapter={adapter!r} was asked for, but {type(model).__name__} has no PEFT adapters")
        return None
    if adapter is None:
        if len(config) == 1:
            return str(next(iter(config)))
        active = _active(unwrap(model))
        if not isinstance(active, list) or len(active) != 1:
            raise ValueError(
                f"several adapters are active, {active}: say which one, adapter=...; there are {list(config)}"
            )
        return str(active[0])
    if adapter not in config:
        raise ValueError(f"the model has no adapter {adapter!r}; it has {list(config)}")
    return adapter


def _active(model: nn.Module) -> Any:
    active = getattr(model, "active_adapters", None)
    return active() if callable(active) else active  # a property of PeftModel, a method of transformers' models


def several_active(model: nn.Module) -> bool:
    """Whether more than one adapter is in use, so that whoever means one has to name it."""
    active = _active(model) if len(adapters(model)) > 1 else None
    return isinstance(active, list) and len(active) > 1


def adapter_weights(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by PEFT's key names; none for a model without adapters.

    Args:
        model: The model.
        adapter: Which adapter; None for the active one.

    Raises:
        ValueError: As :func:`adapter_name`.
    """
    model = unwrap(model)
    chosen = adapter_name(model, adapter)
    return {} if chosen is None else _adapter_keys(model, chosen, dict(model.named_parameters()))


def weight_names(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """Every parameter of a model by the name that files have for it.

    The adapter's parameters have the keys of ``peft.get_peft_model_state_dict``, which adapter_model.safetensors has
    too, modules_to_save included. All others have their name in the model; those of other adapters are left out.

    Args:
        model: The model, perhaps wrapped by DistributedDataParallel or torch.compile.
        adapter: Which adapter; None for the active one.

    Raises:
        ValueError: As :func:`adapter_name`.
    """
    model = unwrap(model)
    chosen = adapter_name(model, adapter)
    params = dict(model.named_parameters())
    if chosen is None:
        return params
    found = _adapter_keys(model, chosen, params)
    of_adapter = {id(param) for param in found.values()}
    # PEFT keeps the parameters of an adapter in dicts by its name, which is therefore one part of theirs.
    others = set(adapters(model)) - {chosen}
    for name, param in params.items():
        if id(param) not in of_adapter and others.isdisjoint(name.split(".")):
            found.setdefault(name, param)
    return found


def aliases(model: nn.Module, adapter: str | None = None) -> dict[str, str]:
    """Further names, in files or in the model, of parameters that have several: the name in :func:`weight_names`.

    Args:
        model: The model.
        adapter: Which adapter; None for the active one.

    Raises:
        ValueError: As :func:`adapter_name`.
    """
    model = unwrap(model)
    chosen = adapter_name(model, adapter)
    canonical = {id(param): name for name, param in weight_names(model, chosen).items()}
    every: list[tuple[str, nn.Parameter]] = list(model.named_parameters(remove_duplicate=False))
    if chosen is not None:
        keys = _keys(model, chosen)
        # Names in the model of what is saved by PEFT's own are no names in files.
        saved = {id(param) for param in keys.values()}
        every = [*keys.items(), *((name, param) for name, param in every if id(param) not in saved)]
    return {name: canonical[id(p)] for name, p in every if canonical.get(id(p), name) != name}


def _adapter_keys(model: nn.Module, adapter: str, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Each parameter of an adapter once, by the first of its keys."""
    own = {id(param) for param in params.values()}
    first: dict[int, str] = {}
    keys = _keys(model, adapter)
    for key, param in keys.items():
        first.setdefault(id(param), key)
    return {key: keys[key] for number, key in first.items() if number in own}


def _keys(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """PEFT's keys of an adapter's parameters; tied and shared ones have several."""
    from peft import PeftModel, get_peft_model_state_dict

    # Given the parameters themselves, PEFT returns them under the names that it saves them by; buffers come along since
    # it looks for them (VeRA's projections). Embedding layers are left out, because finding out whether they were
    # resized may ask the model hub; PEFT saves them by their own names.
    params = dict(model.named_parameters(remove_duplicate=False))
    every: dict[str, Tensor] = {**dict(model.named_buffers(remove_duplicate=False)), **params}
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=every, adapter_name=adapter, save_embedding_layers=False
    )
    by_id = {id(param): param for param in params.values()}
    found = {key: by_id[id(value)] for key, value in state.items() if id(value) in by_id}
    if adapters(model)[adapter].is_prompt_learning:
        found |= _prompt(model, adapter, state, found)
    prefix = "" if isinstance(model, PeftModel) else _HUB_PREFIX
    return {prefix + key: param for key, param in found.items()}


def _prompt(
    model: Any, adapter: str, state: dict[str, Tensor], found: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """The embedding of a prompt, if that is what PEFT saves, and not something that a network has made of it."""
    encoder, saved = model.prompt_encoder[adapter], state.get("prompt_embeddings")
    embedding: nn.Parameter | None = getattr(getattr(encoder, "embedding", None), "weight", None)
    others = {id(p) for p in encoder.parameters()} - {id(p) for p in found.values()} - {id(embedding)}
    if saved is None or embedding is None or others or saved.shape != embedding.shape:
        return {}
    return {"prompt_embeddings": embedding}
