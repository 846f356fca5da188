"""Gradients between backward and step: reading them, refusing bad ones, and the MC samples of an unfinished step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ivon_kernels import sharding
from ivon_kernels.backends.state import ParamState

_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteGradientError(RuntimeError):
    """A gradient holds inf or nan; nothing was changed."""


def check_parameter(param: Tensor, name: str) -> None:
    """Refuse parameters that IVON cannot train.

    Raises:
        TypeError: For a dtype other than float32, bfloat16, float16 and float64.
        ValueError: For a sparse, meta or overlapping tensor, for a DTensor in a placement that is not supported, and
            for the flat parameters of FSDP1 and DeepSpeed's ZeRO-3.
    """
    if param.layout is not torch.strided:
        raise ValueError(f"{name} has layout {param.layout}; IVON trains dense parameters only")
    if param.dtype not in _PARAM_DTYPES:
        dtypes = ", ".join(str(dtype) for dtype in _PARAM_DTYPES)
        raise TypeError(
            f"{name} has dtype {param.dtype}; IVON trains {dtypes}: split complex parameters into real parts"
        )
    if param.device.type == "meta":
        raise ValueError(f"{name} is on the meta device; materialize the model before building the optimizer")
    if hasattr(param, "_fsdp_flattened") or hasattr(param, "_is_flat_param"):
        raise ValueError(
            f"{name} belongs to FullyShardedDataParallel (FSDP1), whose flat shards do not say which elements they "
            "hold; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(param, "ds_id"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO-3, which IVON does not support; use fully_shard")
    if (dtensor := sharding.as_dtensor(param)) is not None:
        sharding.shard_of(dtensor, name)
        param = sharding.local(dtensor)
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"{name} has elements that share memory (an expanded tensor); give IVON a clone of it")


def check_gradient(slot: ParamState, grad: Tensor) -> Tensor:
    """The gradient in a form that the backends take.

    Raises:
        ValueError: If it is sparse.
    """
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {slot.name} has layout {grad.layout}; IVON takes dense gradients only "
            "(for embeddings: sparse=False)"
        )
    if grad.dtype is torch.float64 and slot.mean.dtype is not torch.float64:
        grad = grad.float()
    return grad


@dataclass
class Samples:
    """The MC samples of the step that is under way.

    A sample's gradient is read as late as possible (at the next sample or at the step), so that clipping and unscaling
    take effect; `closed` keeps the gradient tensors of a block that ended, in case `zero_grad` drops them from the
    parameters before that.
    """

    count: int = 0  # samples drawn
    replay: int | None = None  # evaluation sample whose noise the last one has
    unused: bool = False  # the only one was drawn by the step before, and nobody has asked for it yet
    folded: int = 0  # samples whose gradients are in the sums
    of_all_ranks: int = 0  # samples in the sums once they are those of all ranks (sync=True)
    nonfinite: str | None = None  # parameter whose gradient was not finite in a folded sample
    closed: dict[ParamState, tuple[Tensor, int]] = field(default_factory=dict)

    def close(self, slots: Iterable[ParamState]) -> None:
        """Remember the gradients at the end of a block."""
        for slot in slots:
            grad = slot.grad_now()
            if grad is not None:
                self.closed[slot] = (grad, grad._version)

    def take(self, slots: Iterable[ParamState]) -> None:
        """Set each slot's `grad` to the gradient of the last sample, or None."""
        closed, strided, double = self.closed, torch.strided, torch.float64
        for slot in slots:
            grad = slot.grad_now()
            if grad is None and slot in closed:
                grad = closed[slot][0]
            if grad is not None and (grad.layout is not strided or grad.dtype is double):
                grad = check_gradient(slot, grad)
            slot.grad = grad

    def check_not_zeroed(self) -> None:
        """Refuse to average a sample whose gradients were overwritten with zeros before they were read.

        Raises:
            RuntimeError: If every remembered gradient changed since its block ended and is now zero.
        """
        changed = [grad for grad, version in self.closed.values() if grad._version != version]
        if changed and len(changed) == len(self.closed) and not any(bool(grad.any()) for grad in changed):
            raise RuntimeError(
                "the gradients of an MC sample were zeroed in place before they were read; between samples call "
                "optimizer.zero_grad(), or zero_grad(set_to_none=True) on the model"
            )


class EarlierGradient:
    """Tells whether a gradient from before a sample was drawn is still part of the gradient after it.

    That happens in ``step(closure)`` with a closure that does not clear the gradients: those of earlier micro-batches,
    computed at the mean, would pass for the sample's. One parameter, the smallest, is watched, with a copy in place of
    its gradient: what clears gradients leaves another tensor there, or writes zeros before anything is added.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        present = [param for param in params if param.grad is not None]
        self.param = min(present, key=lambda param: param.numel(), default=None)
        if self.param is not None and self.param.grad is not None:
            self.before = self.param.grad
            self.param.grad = self.copy = self.before.detach().clone()
            self.version = self.copy._version

    def kept(self) -> bool:
        """Whether that gradient was left as it was or added to."""
        if self.param is None or self.param.grad is not self.copy:
            return False
        writes = self.copy._version - self.version
        return bool(self.before.any()) and (writes == 0 or (writes == 1 and bool(self.copy.any())))
