"""Hyperparameters: what is allowed, and the scalars of a step computed from them in double.

What does not depend on a parameter's step count is computed once, on the host. The bias correction is computed where
the count is, on the device perhaps: by the same operations in csrc/rows.h, so that all backends have the same bits.
"""

from __future__ import annotations

import ctypes
import math
import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

GROUP_KEYS = (
    "lr",
    "ess",
    "hess_init",
    "beta1",
    "beta2",
    "weight_decay",
    "hess_approx",
    "clip_radius",
    "debias",
    "rescale_lr",
)
"""What a parameter group may override."""

OPTIMIZER_KEYS = ("mc_samples", "sync", "seed", "capturable")
"""What belongs to the whole optimizer: kept in every group so that state dicts carry it."""

_VALUES_OF = operator.itemgetter(*GROUP_KEYS)  # lr first
_PLAIN = frozenset((int, float, bool, str))
HESS_APPROXIMATIONS = ("price", "gradsq")

_HESS_MARGIN = 2.0**-20  # hess + weight_decay never falls below this fraction of weight_decay ...
_HESS_TINY = 1e-30  # ... nor below this
_PRECISION_MAX = 2.0**126  # ess * hess never exceeds this, whatever finite gradients come

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a finite number >= 0", lambda v: 0 <= v < math.inf),
    "ess": ("a finite number > 0", lambda v: 0 < v < math.inf),
    "hess_init": ("a finite number > 0", lambda v: 0 < v < math.inf),
    "beta1": ("in [0, 1)", lambda v: 0 <= v < 1),
    "beta2": ("in [0, 1)", lambda v: 0 <= v < 1),
    "weight_decay": ("a finite number >= 0", lambda v: 0 <= v < math.inf),
    "clip_radius": ("> 0 (inf: no clipping)", lambda v: v > 0),
}


class StepScalars(NamedTuple):
    """Everything of one step that does not depend on the element, in double; the order is that of the C struct."""

    ess: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    one_minus_beta2: float
    inv_debias: float  # 1 / (1 - beta1^t), or 1
    lr: float  # times (hess_init + weight_decay) with rescale_lr
    clip_radius: float  # may be inf
    hess_floor: float  # smallest hess kept: hess_floor + weight_decay > 0 in float32
    hess_ceiling: float  # largest hess kept: ess * hess stays finite in float32
    grad_scale: float  # 1 / (AMP scale * MC samples)
    second_scale: float  # the same for the Hessian statistic: g * eps (price) or g * g (gradsq)
    gradsq: float  # 0: price, 1: gradsq


def validate(group: dict[str, Any], where: str) -> None:
    """Check the hyperparameters of one parameter group.

    Raises:
        ValueError: Naming the hyperparameter, its value, what is allowed, and `where` it stands.
        TypeError: If a number is something else.
    """
    for key, (allowed, holds) in _RANGES.items():
        value = group[key]
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise TypeError(f"{key} must be a number, got {value!r} in {where}")
        if key == "lr" and lr_on_device(group):
            continue  # reading it would wait for the device
        if not holds(float(value)):
            raise ValueError(f"{key} must be {allowed}, got {group[key]} in {where}")
    if group["hess_approx"] not in HESS_APPROXIMATIONS:
        raise ValueError(f"hess_approx must be one of {HESS_APPROXIMATIONS}, got {group['hess_approx']!r} in {where}")


def power(base: float, exponent: int) -> float:
    """`base ** exponent` by squaring: multiplications alone, in the order of csrc/rows.h."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def inv_debias(group: dict[str, Any], step: int) -> float:
    """Bias correction of the momentum in the update that follows `step` finished ones."""
    return 1.0 / (1.0 - power(float(group["beta1"]), step + 1)) if group["debias"] else 1.0


def group_scalars(group: dict[str, Any], amp_scale: float, samples: int) -> StepScalars:
    """The scalars of a parameter group's next update, without the bias correction.

    Args:
        group: The parameter group.
        amp_scale: The loss scale that its gradients still carry.
        samples: MC samples that the sums hold.
    """
    weight_decay = float(group["weight_decay"])
    beta1, beta2 = float(group["beta1"]), float(group["beta2"])
    gradsq = group["hess_approx"] == "gradsq"
    return StepScalars(
        ess=float(group["ess"]),
        weight_decay=weight_decay,
        beta1=beta1,
        one_minus_beta1=1.0 - beta1,
        one_minus_beta2=1.0 - beta2,
        inv_debias=1.0,
        lr=0.0 if lr_on_device(group) else float(group["lr"]) * lr_factor(group),
        clip_radius=float(group["clip_radius"]),
        hess_floor=max(-weight_decay * (1.0 - _HESS_MARGIN), _HESS_TINY - weight_decay),
        hess_ceiling=_PRECISION_MAX / max(float(group["ess"]), 1.0),
        grad_scale=1.0 / (amp_scale * samples),
        second_scale=1.0 / ((amp_scale**2 if gradsq else amp_scale) * samples),
        gradsq=float(gradsq),
    )


def step_scalars(group: dict[str, Any], step: int) -> StepScalars:
    """The scalars of the update that follows `step` finished ones, from one sample and without a loss scale."""
    return group_scalars(group, 1.0, 1)._replace(inv_debias=inv_debias(group, step))


def lr_on_device(group: dict[str, Any]) -> bool:
    """Whether kernels read the learning rate from the device (``capturable=True``), where it is a float64 tensor."""
    return bool(group.get("capturable")) and isinstance(group["lr"], Tensor)


def lr_factor(group: Mapping[str, Any]) -> float:
    """What the learning rate is multiplied by."""
    return float(group["hess_init"]) + float(group["weight_decay"]) if group["rescale_lr"] else 1.0


def highest_lr(group: Mapping[str, Any]) -> float:
    """The learning rate that a group's schedule starts from, as the user sets it: torch's schedules note it."""
    return max(float(group["lr"]), float(group.get("initial_lr", 0.0)))


def first_sigma(group: Mapping[str, Any]) -> float:
    """The standard deviation of every weight of a group before the first step."""
    return 1.0 / math.sqrt(float(group["ess"]) * (float(group["hess_init"]) + float(group["weight_decay"])))


class GroupScalars:
    """What the parameter groups tell one launch, as struct GroupRow of csrc/rows.h.

    Attributes:
        data: 96 bytes for each group, in their order.
        address: Where `data` is.
        version: Another number whenever `data` changed.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.address = 0
        self.version = 0
        self._known: list[tuple[Any, ...]] = []
        self._scalars: list[StepScalars] = []
        self._resolved: dict[tuple[int, int], StepScalars] = {}
        self._groups: Sequence[dict[str, Any]] = ()

    def update(self, groups: Sequence[dict[str, Any]], amp_scale: float = 1.0, samples: int = 1) -> None:
        """Follow the groups' hyperparameters.

        Raises:
            ValueError, TypeError: If one was set to something that cannot be used.
        """
        wanted = [_identity(group, amp_scale, samples) for group in groups]
        if wanted == self._known:
            return
        for number, group in enumerate(groups):
            validate(group, f"parameter group {number}")
        self._scalars = [group_scalars(group, amp_scale, samples) for group in groups]
        self.data = bytearray().join(
            _pack(group, scalars, samples) for group, scalars in zip(groups, self._scalars, strict=True)
        )
        self.address = ctypes.addressof((ctypes.c_char * len(self.data)).from_buffer(self.data))
        self._known, self._groups = wanted, groups
        self._resolved.clear()
        self.version += 1

    def scalars(self, group: int, step: int) -> StepScalars:
        """The scalars of a parameter's update that follows `step` finished ones."""
        found = self._resolved.get((group, step))
        if found is None:
            if len(self._resolved) > 1000:  # one entry a step, for ever
                self._resolved.clear()
            found = self._scalars[group]._replace(inv_debias=inv_debias(self._groups[group], step))
            self._resolved[group, step] = found
        return found


def advice_on_decay(groups: Sequence[Mapping[str, Any]], own: float) -> str | None:
    """What to say where several groups, all of them, have no weight decay, though the optimizer was not built without.

    Helpers that make groups do that. Who writes one group by hand means it.

    Args:
        groups: The parameter groups.
        own: The optimizer's argument.
    """
    used = [group for group in groups if group["params"]]
    if not own or len(used) < 2 or any(group["weight_decay"] for group in used):
        return None
    return (
        f"every parameter group has weight_decay=0, so that IVON's weight_decay={own:g}, the precision of its prior, "
        "is not used: helpers that make groups set that unasked (pass loraplus_weight_decay to PEFT's "
        "create_loraplus_optimizer); if it is meant, pass weight_decay=0 to IVON too"
    )


def _identity(group: dict[str, Any], amp_scale: float, samples: int) -> tuple[Any, ...]:
    """Equal as long as the group's row is. This runs at every sample and step, for every group."""
    values: tuple[Any, ...] = _VALUES_OF(group)
    if not _PLAIN.issuperset(map(type, values)):
        lr = [("device", values[0].data_ptr())] if lr_on_device(group) else [float(values[0])]
        values = (*lr, *(float(value) if isinstance(value, Tensor) else value for value in values[1:]))
    return (*values, amp_scale, samples)


def _debias_until(group: dict[str, Any]) -> int:
    """From which update on the bias correction is 1 in float32: beta1^t <= 2^-26."""
    if not group["debias"]:
        return 0
    beta1 = float(group["beta1"])
    return 1 if beta1 == 0.0 else min(math.ceil(-26.0 / math.log2(beta1)) + 1, 2**62)


def _pack(group: dict[str, Any], scalars: StepScalars, samples: int) -> bytes:
    lr = group["lr"]
    return b"".join(
        (
            array("f", (*scalars, 0.0)).tobytes(),
            array("d", (float(group["beta1"]), lr_factor(group), float(samples))).tobytes(),
            array("q", (_debias_until(group), lr.data_ptr() if lr_on_device(group) else 0)).tobytes(),
        )
    )
