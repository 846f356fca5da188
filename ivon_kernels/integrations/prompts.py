"""PEFT's prompt learning, whose saves compute the prompt from weights and not from a state dict: of the mean."""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ivon_kernels.integrations.hooks import IVONHook
from ivon_kernels.optimizer import IVON

__all__ = ["Attribute", "prompts_of_mean"]

_PROMPT = "get_prompt_embedding_to_save"


class Attribute:
    """What was put into a module, to be taken away as a hook is."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = weakref.ref(module), name

    def remove(self) -> None:
        """Take it away."""
        module = self._module()
        if module is not None:
            vars(module).pop(self._name, None)


class _PutMeanInPrompt(IVONHook):
    """In place of PEFT's method."""

    __name__ = _PROMPT  # by which the bound method is pickled, and then PEFT's own again

    def __call__(self, model: Any, adapter_name: str) -> Tensor:
        optimizer = self.optimizer()
        encoder: nn.Module = model.prompt_encoder[adapter_name]
        places = [(owner._parameters, key, p) for owner in encoder.modules() for key, p in owner._parameters.items()]
        try:
            if optimizer is not None and optimizer.holds_sample:
                for params, key, param in places:
                    if param is not None and param in optimizer.state:
                        params[key] = nn.Parameter(optimizer.mean_of(param), requires_grad=False)
            prompt: Tensor = getattr(type(model), _PROMPT)(model, adapter_name)
        finally:
            for params, key, param in places:
                params[key] = param
        return prompt


def prompts_of_mean(model: nn.Module, ivon: IVON) -> list[Attribute]:
    """Have the prompts of a model and the modules in it saved at the mean. Returns what was put there."""
    handles = []
    for module in model.modules():
        own = getattr(vars(module).get(_PROMPT), "__func__", None)
        if hasattr(type(module), _PROMPT) and not (isinstance(own, _PutMeanInPrompt) and own.optimizer() is ivon):
            # Bound as PEFT's own, so that a copied model has it bound to itself.
            vars(module)[_PROMPT] = MethodType(_PutMeanInPrompt(ivon), module)
            handles.append(Attribute(module, _PROMPT))
    return handles
