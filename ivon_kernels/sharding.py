"""DTensor parameters (FSDP2, HSDP, tensor parallelism): their local shards, and what a shard's elements are numbered.

Kernels see local shards as ordinary tensors. A normal depends on the element's index in the unsharded tensor alone, so
that any number of ranks draws the same sample. Nothing here communicates, but for gradients and loaded state in another
placement than the parameter's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ivon_kernels.noise import Shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_PLAIN = (Tensor, nn.Parameter)


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor. Imports nothing for others."""
    # A process without DTensors should not pay for importing torch.distributed.tensor.
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def local(dtensor: DTensor) -> Tensor:
    """The local shard: the memory itself, outside autograd, complete."""
    # What to_local() returns outside autograd, after 10 us; every step asks for the shard of every parameter.
    shard: Tensor = dtensor._local_tensor
    if type(shard) is not Tensor and hasattr(shard, "wait"):  # an asynchronous collective is still writing it
        shard = shard.wait()
    return shard


def memory(param: Tensor) -> Tensor:
    """What the kernels write: the parameter, of a DTensor the local shard."""
    dtensor = as_dtensor(param)
    return param if dtensor is None else local(dtensor)


def local_grad(grad: Tensor, param: DTensor) -> Tensor:
    """The local shard of a DTensor parameter's gradient, in the parameter's placement."""
    distributed: DTensor | None = grad if type(grad) is type(param) else as_dtensor(grad)
    if distributed is None:
        return grad
    # Where a gradient has its parameter's own spec, comparing identity spares comparing placements for every parameter.
    # Under tensor parallelism a gradient may be Partial and has to be reduced first.
    if distributed._spec is not param._spec and distributed.placements != param.placements:
        with torch.no_grad():
            distributed = distributed.redistribute(placements=param.placements)
    return local(distributed)


def shard_of(param: DTensor, name: str) -> Shard | None:
    """Where the local shard's elements are in the unsharded tensor; None if it is whole.

    Raises:
        ValueError: For a placement whose local elements are not evenly spaced runs of the unsharded tensor's.
    """
    shape, offset = _local_shape_and_offset(param, name)
    whole = tuple(param.shape)
    if shape == whole:
        return None
    strides = [1] * len(whole)
    for d in range(len(whole) - 1, 0, -1):
        strides[d - 1] = strides[d] * whole[d]
    start = sum(o * stride for o, stride in zip(offset, strides, strict=True))
    if 0 in shape:  # a rank without elements: uneven shards leave some out
        return Shard(0, 1, 1)
    last = max(d for d in range(len(whole)) if shape[d] != whole[d])
    outer = next((d for d in range(last) if shape[d] != 1), last)
    if any(shape[d] != whole[d] for d in range(outer + 1, last)):
        raise ValueError(_unsupported(param, name, "shards of two inner dimensions"))
    return Shard(start, run=shape[last] * strides[last], pitch=whole[last] * strides[last])


def _local_shape_and_offset(param: DTensor, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} is a DTensor on a device mesh that rank {dist.get_rank()} is not part of")
    for position, placement in enumerate(placements):
        if isinstance(placement, Replicate) or type(placement) is ShardPlacement:
            continue
        dim, split = getattr(placement, "dim", None), getattr(placement, "split_factor", None)
        later = 1
        for number in range(position + 1, mesh.ndim):
            later *= mesh.size(number) if getattr(placements[number], "dim", None) == dim else 1
        if split is None or split != later:  # FSDP2 over tensor parallelism has a strided placement with split == later
            raise ValueError(_unsupported(param, name, repr(placement)))
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    if tuple(shape) != tuple(local(param).shape):
        raise ValueError(_unsupported(param, name, f"a local shard of shape {tuple(local(param).shape)}"))
    return tuple(shape), tuple(offset)


def _unsupported(param: DTensor, name: str, what: str) -> str:
    return (
        f"{name} is a DTensor of shape {tuple(param.shape)} placed as {param.placements}: IVON does not support "
        f"{what}; use Shard(0), one sharded inner dimension, or Replicate (fully_shard's placements)"
    )


def like(shard: Tensor, param: DTensor) -> DTensor:
    """A local tensor as a DTensor in the placement of a parameter; they share memory."""
    from torch.distributed.tensor import DTensor

    # run_check compares the ranks' shapes by communication; shape and stride have to be given, because those worked out
    # from one rank's shard are wrong where shards are uneven.
    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def localize(value: Tensor, param: DTensor | None) -> Tensor:
    """Loaded state as this rank's shard of a parameter (None: a plain one), whatever placement it has.

    A state in another placement is redistributed: all ranks have to load it then.
    """
    value = value.detach()
    distributed = as_dtensor(value)
    if distributed is not None:
        if param is not None and distributed.device_mesh == param.device_mesh:
            return local(distributed.redistribute(placements=param.placements))
        value = distributed.full_tensor()
    if param is None:
        return value
    shape, offset = _local_shape_and_offset(param, "a parameter")
    for dim, (size, begin) in enumerate(zip(shape, offset, strict=True)):
        value = value.narrow(dim, begin if size else 0, size)
    return value


def fsdp_modules(params: Iterable[Tensor]) -> list[Any]:
    """The FSDP2 modules that gather these parameters.

    A module that kept its gathered weights (``reshard_after_forward=False``, as FSDP2's root does, after a forward pass
    without backward) would not see weights that are written to the shards later: ``reshard()`` makes it gather again.
    """
    wanted = {id(param) for param in params if as_dtensor(param) is not None}
    if not wanted:
        return []
    # FSDP2 has no public way from a sharded parameter to the module that gathers it. Where these private places are
    # gone, all but the root still gather at each forward pass.
    try:
        states = importlib.import_module("torch.distributed._composable_state")._module_state_mapping
        from torch.distributed.fsdp import FSDPModule
    except (ImportError, AttributeError):
        return []
    modules = [module for module in list(states) if isinstance(module, FSDPModule)]
    return [module for module in modules if any(id(param) in wanted for param in _sharded_params(module))]


def _sharded_params(module: Any) -> list[Tensor]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11; one group before
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return [fsdp_param.sharded_param for group in groups for fsdp_param in group.fsdp_params]
