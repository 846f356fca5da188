"""What IVON refuses: parameters that it cannot train, and gradients that it cannot use."""

from __future__ import annotations

import torch
from torch import Tensor

from ivon_kernels import sharding
from ivon_kernels.backends.state import ParamState

__all__ = ["NonFiniteGradientError", "check_gradient", "check_parameter"]

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
    # Kernels write each element once, so elements that share memory would get one of several samples.
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"{name} has elements that share memory (an expanded tensor); give IVON a clone of it")


def check_gradient(state: ParamState, grad: Tensor) -> Tensor:
    """The gradient in a form that the backends take.

    Raises:
        ValueError: If it is sparse.
    """
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {state.name} has layout {grad.layout}; IVON takes dense gradients only "
            "(for embeddings: sparse=False)"
        )
    if grad.dtype is torch.float64 and state.mean.dtype is not torch.float64:
        grad = grad.float()
    return grad
