"""What of a model's adapters belongs to a posterior beside the weights, and whether they are in use."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ivon_kernels.gaussians import names

__all__ = ["NO_ORIGIN", "Layers", "Origin", "origin_of", "own_adapter"]


@dataclass(frozen=True)
class Origin:
    """Where in a model the Gaussians were trained.

    Attributes:
        adapter: Name of the PEFT adapter; None: of no adapter, or not known.
        scaling: By name of the weight, what its layer scales this adapter with.
        aliases: Other names that tied and shared weights have in files and models, to the one that the posterior has.
    """

    adapter: str | None = None
    scaling: Mapping[str, float] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


NO_ORIGIN = Origin()


def origin_of(model: nn.Module, adapter: str | None, params: Mapping[str, Tensor]) -> Origin:
    """See :class:`Origin`.

    Args:
        model: The model.
        adapter: The adapter, by name; None for a model without.
        params: The weights by the posterior's names.
    """
    aliases = {alias: name for alias, name in names.aliases(model, adapter).items() if name in params}
    return Origin(adapter, {} if adapter is None else Layers(model, adapter, params).scaling(), aliases)


def own_adapter(model: nn.Module, params: Iterable[Tensor]) -> str | None:
    """The one adapter of several that has some of these parameters; None if none or several have."""
    wanted = {id(param) for param in params}
    found = [
        adapter
        for adapter in names.adapters(names.unwrap(model))
        if any(id(param) in wanted for param in names.adapter_weights(model, adapter).values())
    ]
    return found[0] if len(found) == 1 else None


class Layers:
    """The layers of PEFT that some weights of an adapter are in, as far as they decide what these do.

    Args:
        model: The model.
        adapter: The adapter, by name.
        params: The weights by the posterior's names.
    """

    def __init__(self, model: nn.Module, adapter: str, params: Mapping[str, Tensor]) -> None:
        self._model, self._adapter = names.unwrap(model), adapter
        self._layers: list[tuple[str, Any]] = []  # each once, by its path
        self._scaled: dict[str, Any] = {}  # the layer whose `scaling` is for this weight
        # Even the path of a module that the model has in two places counts: a shared vector bank is in all its layers.
        modules = dict(self._model.named_modules(remove_duplicate=False))
        of = {id(param): name for name, param in params.items()}
        kinds = _layer_kinds()
        seen = set()
        for path, owner in modules.items():
            for param in owner._parameters.values():
                name = of.get(id(param)) if param is not None else None
                for ancestor in _ancestors(path) if name is not None else ():
                    layer: Any = modules[ancestor]
                    if not isinstance(layer, kinds):
                        continue
                    if id(layer) not in seen:
                        seen.add(id(layer))
                        self._layers.append((ancestor, layer))
                    if isinstance(getattr(layer, "scaling", None), Mapping):
                        self._scaled.setdefault(str(name), layer)

    def scaling(self) -> dict[str, float]:
        """What each weight's layer scales the adapter with, where it does."""
        found = {name: layer.scaling.get(self._adapter) for name, layer in self._scaled.items()}
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}

    def check(self, origin: Origin) -> None:
        """Refuse a model in which samples of the weights would have no effect, or another one than in training.

        Raises:
            RuntimeError: If the adapter is merged, disabled or not active.
            ValueError: If a layer scales it otherwise than where the posterior was trained.
        """
        self.refuse_merged()
        adapter, model = self._adapter, self._model
        disabled = "" if getattr(model, "_adapters_disabled", False) else None
        disabled = next((path for path, layer in self._layers if layer.disable_adapters), disabled)
        if disabled is not None:
            raise RuntimeError(
                f"adapter {adapter!r}, which the posterior is of, is disabled{disabled and f' in {disabled}'}, and its "
                "samples would have no effect: leave disable_adapter(), or enable it again"
            )
        config = names.adapters(model)[adapter]
        where = [(path, layer.active_adapters) for path, layer in self._layers]
        if getattr(config, "is_prompt_learning", False):
            where.append(("the model", getattr(model, "active_adapters", [adapter])))
        if inactive := next((found for found in where if adapter not in found[1]), None):
            raise RuntimeError(
                f"adapter {adapter!r}, which the posterior is of, is not active in {inactive[0]} ({list(inactive[1])} "
                f"is), and its samples would have no effect: call model.set_adapter({adapter!r}), or name the adapter "
                "that holds this posterior's weights, adapter=..."
            )
        now = self.scaling()
        for name, was in origin.scaling.items():
            if name in now and not math.isclose(now[name], was, rel_tol=1e-6):
                raise ValueError(
                    f"adapter {adapter!r} is scaled by {now[name]:g} at {name}, and the posterior's own adapter "
                    f"({origin.adapter!r}) by {was:g}: load it with the lora_alpha and rank that it was trained with, "
                    "or name the right one, adapter=..."
                )

    def refuse_merged(self) -> None:
        """Refuse adapters that are part of the base weights now.

        Raises:
            RuntimeError: If there is one.
        """
        for path, layer in self._layers:
            if getattr(layer, "merged_adapters", None):
                raise RuntimeError(
                    f"{path}: an adapter is merged into the base weights, and samples would have no effect: call "
                    "unmerge_adapter() first"
                )


def _layer_kinds() -> tuple[Any, ...]:
    """Layers that can be disabled, and have active adapters; none where PEFT was not imported."""
    found = []
    for module, name in (
        ("peft.tuners.tuners_utils", "BaseTunerLayer"),
        ("peft.utils.other", "AuxiliaryTrainingWrapper"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        found += [] if kind is None else [kind]
    return tuple(found)


def _ancestors(path: str) -> Iterator[str]:
    """The path itself, and those around it."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path
