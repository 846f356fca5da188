"""Settings of IVON for who knows AdamW's learning rate, and the published ones for LoRA.

Where the rule comes from (docs/recipe.md has the measurements). The clip of the preconditioned direction is set so low
that it binds on nearly every weight: a step then moves each by ``lr * clip_radius``, whatever the gradients' scale. A
step of AdamW moves a weight by its learning rate only where all gradients agree; where they are noise it is
``sqrt((1 - beta1) / (1 + beta1)) = 0.23`` of it in the root mean square, and most weights are in between: STEP of it.

What is left to choose is the noise. It is relative to the size of the weights that it is added to; as that of a Bayes
posterior it shrinks with the root of the number of examples; it grows with the number of times that each is seen,
because that is what overfits; and it never exceeds what the run can learn against: a multiple of the way that a weight
can go under a linear schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ivon_kernels import sharding

__all__ = ["LEARNING_RATE", "SETTINGS", "Wanted", "arrange"]

SETTINGS = ("lr", "ess", "hess_init", "clip_radius", "beta2")  # what the recipe decides

LEARNING_RATE = 1e-3  # the default of torch.optim.AdamW
STEP = 0.5  # how far a step takes a weight, in AdamW's learning rates
STEP_IN_SIZES = 0.04  # and how far it may take one of LoRA's or beside them, in sizes of these: beyond lies a cliff
CLIP_RADIUS = 1e-4
HESS = 0.04
PER_EPOCH = 0.2  # sigma in sizes of the weights for each time that an example is seen, at least once ...
EPOCHS = 10.0  # ... and at most so many times
EXAMPLES = 200.0  # for up to so many examples; beyond, it goes as one over the root of their number
MOST = {"lora": 2.0, "whole": 1.0, "beside": 0.1}  # the largest of these ratios, by what the weights are
OF_PRODUCT = 0.31  # and of LoRA's sigma in square roots of their size: what is added to the frozen weights is a product
IN_TRAVELS = 1.5  # sigma in ways that a weight can go, at most
BATCH = 8  # where only steps and examples are known
SIGMA = 0.01  # of weights that are all zero

PUBLISHED_LR = 0.03  # for 10,000 steps
PUBLISHED_CLIP = 1e-3
PUBLISHED_BETA2 = 0.99999
PUBLISHED_HESS = {1e6: 1e-3, 1e7: 3e-4, 1e8: 3e-4}  # by ess: tasks with four answers, with two, WinoGrande-M

Kind = Literal["lora", "whole", "beside"]
_FACTOR = re.compile(r"\blora_(embedding_)?[AB]\b")


@dataclass(frozen=True)
class Wanted:
    """What the caller of :meth:`ivon_kernels.IVON.for_lora` said, whose arguments these are; None is worked out.

    Raises:
        ValueError: A number is out of range or no number, or two of them contradict each other.
    """

    num_data: Any
    learning_rate: Any = None
    steps: Any = None
    epochs: Any = None
    sigma: Any = None
    recipe: str | None = None
    lr: float | None = None
    ess: float | None = None
    hess_init: float | None = None
    clip_radius: float | None = None
    beta2: float | None = None

    def __post_init__(self) -> None:
        least = {
            "num_data": 1.0,
            "steps": 1.0,
            **dict.fromkeys(("learning_rate", "epochs", "sigma"), math.nextafter(0, 1)),
        }
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None or name == "num_data":
                object.__setattr__(self, name, _number(value, name, "at least 1" if bound == 1 else "positive", bound))
        if self.recipe not in (None, "paper"):
            raise ValueError(f"recipe must be 'paper' or None, got {self.recipe!r}")
        if self.lr is not None and self.learning_rate is not None:
            raise ValueError(
                f"lr={self.lr:g} and learning_rate={self.learning_rate:g} say the same thing twice: learning_rate is "
                "AdamW's, which the recipe translates into lr, IVON's own; give one of them"
            )
        if self.recipe == "paper" and (self.sigma is not None or self.learning_rate is not None):
            raise ValueError("recipe='paper' has its own lr, ess and hess_init: leave learning_rate and sigma out")
        if self.sigma is not None and self.ess is not None and self.hess_init is not None:
            raise ValueError("of sigma, ess and hess_init two decide the third: leave one of them out")

    def settings(self, kind: Kind, size: float) -> dict[str, float]:
        """What a parameter group of this kind, with weights of this root mean square, is trained with."""
        found = self._published() if self.recipe == "paper" else self._translated(kind, size)
        given = {name: getattr(self, name) for name in found}
        return {name: value if given[name] is None else given[name] for name, value in found.items()}

    def _published(self) -> dict[str, float]:
        ess = max(1e6, self.num_data) if self.ess is None else self.ess
        hess = PUBLISHED_HESS.get(ess, PUBLISHED_HESS[1e6])
        return {
            "lr": PUBLISHED_LR,
            "ess": ess,
            "hess_init": hess,
            "clip_radius": PUBLISHED_CLIP,
            "beta2": PUBLISHED_BETA2,
        }

    def _translated(self, kind: Kind, size: float) -> dict[str, float]:
        clip = CLIP_RADIUS if self.clip_radius is None else self.clip_radius
        step = STEP * (LEARNING_RATE if self.learning_rate is None else self.learning_rate)
        if kind != "whole" and size:
            step = min(step, STEP_IN_SIZES * size)
        if self.lr is not None:
            step = self.lr * clip
        sigma = self._sigma(kind, size, step)
        ess, hess = self._noise(sigma)
        # The Hessian estimate is noise around a curvature. Steps are averaged over so many that this noise, with
        # gradients of up to `hess`, makes it no more than 1.15 times as large, and sigma no smaller by itself.
        return {
            "lr": step / clip,
            "ess": ess,
            "hess_init": hess,
            "clip_radius": clip,
            "beta2": 1 - min(1e-3, max(0.3 * sigma**2, 1e-7)),
        }

    def _sigma(self, kind: Kind, size: float, step: float) -> float:
        if self.ess is not None and self.hess_init is not None:
            return float((self.ess * self.hess_init) ** -0.5)
        if self.sigma is not None:
            return float(self.sigma if kind != "beside" or not size else min(self.sigma, MOST[kind] * size))
        epochs = self.epochs
        if epochs is None:
            epochs = 1.0 if self.steps is None else BATCH * self.steps / self.num_data
        ratio = PER_EPOCH * min(max(epochs, 1.0), EPOCHS) * min(1.0, (EXAMPLES / self.num_data) ** 0.5)
        sigma = size * min(ratio, MOST[kind]) if size else SIGMA
        if kind == "lora" and size:
            sigma = min(sigma, OF_PRODUCT * size**0.5)
        return sigma if self.steps is None else min(sigma, IN_TRAVELS * step * self.steps / 2)

    def _noise(self, sigma: float) -> tuple[float, float]:
        """The ess and the hess_init that give this sigma; the posterior is never warmer than Bayes'."""
        precision = sigma**-2  # ess * hess_init
        if self.ess is not None:
            return self.ess, precision / self.ess
        hess = min(HESS, precision / self.num_data) if self.hess_init is None else self.hess_init
        ess = precision / hess
        if ess < self.num_data * (1 - 1e-9):  # not where hess_init was worked out, but for rounding
            raise ValueError(
                f"sigma {sigma:g} with hess_init {hess:g} means ess {ess:.3g}, less than num_data ({self.num_data:g}): "
                "a posterior warmer than Bayes'. Leave hess_init out, or make it "
                f"{precision / self.num_data:.2g} or less."
            )
        return ess, hess


def arrange(params: ParamsT | nn.Module, wanted: Wanted) -> list[dict[str, Any]]:
    """Parameter groups with their settings: what a group says itself stays.

    LoRA's factors are one group and what is trained beside them (a head, norms, `modules_to_save`) is another, where
    names tell them apart: of a module, of named parameters. Groups that were made already stay as they are.
    """
    groups = _groups(params)
    sizes = [_sizes(_trained(group["params"])) for group in groups]
    factors = [_is_factor(group["params"], of_each) for group, of_each in zip(groups, sizes, strict=True)]
    arranged = []
    for group, lora, of_each in zip(groups, factors, sizes, strict=True):
        kind: Kind = "lora" if lora else "beside" if any(factors) else "whole"
        arranged.append({**wanted.settings(kind, _size(of_each)), **group})
    return arranged


def _groups(params: ParamsT | nn.Module) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module):
        params = [(name, param) for name, param in params.named_parameters() if param.requires_grad]
    given: list[Any] = [params] if isinstance(params, Tensor) else list(params)  # torch refuses a tensor by itself
    if not given or isinstance(given[0], dict):
        return [{**group, "params": _listed(group["params"])} for group in given] or [{"params": []}]
    factors = [item for item in given if _named_factor(item)]
    others = [item for item in given if not _named_factor(item)]
    return [{"params": part} for part in (factors, others) if part]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _trained(params: Iterable[Any]) -> list[Tensor]:
    """The tensors, without names and without what is frozen: of QLoRA's base the bytes mean nothing."""
    tensors = [item[1] if isinstance(item, tuple) else item for item in params]
    return [tensor for tensor in tensors if tensor.requires_grad]


def _named_factor(item: Any) -> bool:
    return isinstance(item, tuple) and _FACTOR.search(str(item[0])) is not None


def _is_factor(params: Sequence[Any], sizes: Sequence[float]) -> bool:
    """Whether a group holds LoRA's factors: by name, or without names by matrices that start at zero."""
    if any(isinstance(item, tuple) for item in params):
        return any(map(_named_factor, params))
    return any(size == 0 and param.ndim == 2 for size, param in zip(sizes, _trained(params), strict=True))


def _size(sizes: Iterable[float]) -> float:
    """The typical root mean square of the tensors that are not zero: their median. 0 where all are."""
    found = sorted(size for size in sizes if 0 < size < math.inf)
    return found[len(found) // 2] if found else 0.0


@torch.no_grad()
def _sizes(params: Sequence[Tensor]) -> list[float]:
    """Root mean squares; of sharded parameters over all shards, which all ranks have to ask for."""
    found = []
    for param in params:
        norm = torch.linalg.vector_norm(param.detach(), dtype=torch.float32 if param.itemsize < 8 else None)
        dtensor = sharding.as_dtensor(norm)
        found.append((norm if dtensor is None else dtensor.full_tensor()) / max(param.numel(), 1) ** 0.5)
    return [float(size) for size in found]


def _number(value: SupportsFloat, name: str, wanted: str, least: float) -> float:
    """A setting as a Python number: NumPy's numbers and tensors of one are taken too."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # of tensors of several
        number = math.nan
    if not least <= number < math.inf:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number
