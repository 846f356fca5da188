"""What runs in place of a module's forward() while samples are stacked in the batch."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ivon_kernels import caches
from ivon_kernels.gaussians.placement import Placement
from ivon_kernels.lora.factor import DTYPES, Factor
from ivon_kernels.lora.guard import COPIED, CannotStackError
from ivon_kernels.lora.modules import LoraWeights, SampledModule, Weight
from ivon_kernels.lora.op import lora_samples_
from ivon_kernels.tree import concatenate, map_tensors, tensors

__all__ = ["FusedLora", "Patch", "SampleBySample"]


class Patch(ABC):
    """A module's forward() with several samples of its weights, each for its own part of the batch.

    Attributes:
        nbytes: Memory that this patch allocated.
        calls: How often it ran.
    """

    nbytes: int

    def __init__(self, sampled: SampledModule, samples: Sequence[int]) -> None:
        self.path = sampled.path
        self.module = sampled.module
        self.params = [weight.param for weight in sampled.weights]
        self.samples = samples
        self.calls = 0
        self._own = vars(sampled.module).get("forward")  # accelerate's hooks put one there, for example
        self.forward = sampled.module.forward

    def install(self) -> None:
        """Take the place of forward()."""
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """Give it back."""
        if self._own is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names cannot be used while samples are stacked")
        if getattr(self.module, "merged", False):
            raise RuntimeError(f"{self.path}: an adapter is merged into the base weights: call unmerge_adapter()")
        inputs = list(tensors((args, kwargs)))
        if not inputs:
            raise CannotStackError(
                f"{self.path} was called without a tensor: there is no batch to divide among the samples"
            )
        _refuse_gradients(*inputs, *self.params)
        rows = inputs[0].shape[0] if inputs[0].dim() else 0
        if rows % len(self.samples) or not inputs[0].dim():
            raise CannotStackError(
                f"{self.path} has a batch of {rows}, which cannot be divided among {len(self.samples)} samples: pass "
                "every input through stack.repeat() (position_ids and the like too, if the model has them)"
            )
        return self.run(rows, args, kwargs)

    @abstractmethod
    def run(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What forward() returns for a batch of `rows`, a multiple of the number of samples."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise RuntimeError(COPIED)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(COPIED)


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "stacked samples are for prediction, and no gradient goes through them: run the model under "
            "torch.inference_mode() or torch.no_grad()"
        )


class FusedLora(Patch):
    """A PEFT LoRA linear layer: the base layer runs once, each sample adds its own low-rank product to its rows.

    The rest is as in ``forward()`` of ``peft.tuners.lora``: several active adapters, disabled ones, dropout, casts.
    """

    def __init__(
        self, sampled: SampledModule, weights: LoraWeights, samples: Sequence[int], seed: int, backend: str | None
    ) -> None:
        super().__init__(sampled, samples)
        self.adapter = weights.adapter
        self.seed = seed
        self.backend = backend
        self.nbytes = 0
        self.a, self.b = self._factor(weights.a), self._factor(weights.b)
        # As PEFT's bitsandbytes layers do, which cast neither inputs nor outputs under autocast.
        self._quantized = type(sampled.module).__name__ in ("Linear8bitLt", "Linear4bit")

    def _factor(self, weight: Weight) -> Factor:
        """The posterior's own tensors where they are, copies on the parameter's device elsewhere."""
        gaussian, device = weight.gaussian, weight.param.device
        mean = gaussian.mean.to(device).contiguous()
        inv_sigma = gaussian.inv_sigma.to(device).contiguous()
        self.nbytes += inv_sigma.nbytes + (0 if mean.data_ptr() == gaussian.mean.data_ptr() else mean.nbytes)
        return Factor(mean, inv_sigma, gaussian.index, weight.param.dtype)

    def run(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._forward(*args, **kwargs)

    def _forward(
        self, x: Tensor, *args: Any, adapter_names: None = None, alora_offsets: Any = None, **kwargs: Any
    ) -> Tensor:
        """The same arguments as PEFT's forward()."""
        if alora_offsets is not None:
            raise ValueError("alora_offsets cannot be used while samples are stacked")
        layer: Any = self.module
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters:
            return result
        dtype = result.dtype
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        for name in adapters:  # in PEFT's order: DoRA scales what the ones before it have added
            if name != self.adapter:
                x, result = self._add_other(name, x, result)
                continue
            if len(adapters) > 1:  # PEFT rounds to the base's dtype after the last one
                result = result.to(torch.promote_types(dtype, self.a.dtype))
            result = self._add_samples(x, result)
        return result.to(dtype)

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        layer: Any = self.module
        if self._quantized and torch.is_autocast_enabled():
            return x
        cast: Tensor = layer._cast_input_dtype(x, dtype)
        return cast

    def _add_other(self, name: str, x: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
        """Another active adapter, the same for all samples."""
        layer: Any = self.module
        x = self._cast(x, layer.lora_A[name].weight.dtype)
        if name in layer.lora_variant:
            result = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result)
        else:
            result = result + layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name]
        return x, result

    def _add_samples(self, x: Tensor, result: Tensor) -> Tensor:
        _refuse_gradients(result)
        layer: Any = self.module
        dropout = layer.lora_dropout[self.adapter]
        widens = self.a.dtype == torch.float32 and x.dtype in DTYPES  # exact, and the kernels do it themselves
        if dropout.training or not widens:
            x = dropout(self._cast(x, self.a.dtype))
        if layer.base_layer._forward_hooks or not result.is_contiguous():  # a hook may have kept it
            result = result.clone(memory_format=torch.contiguous_format)
        lora_samples_(
            result.view(-1, result.shape[-1]),
            x.reshape(-1, x.shape[-1]).contiguous(),  # a slice, such as the last tokens, stays one in reshape
            self.a,
            self.b,
            scaling=layer.scaling[self.adapter],
            seed=self.seed,
            samples=self.samples,
            backend=self.backend,
        )
        return result


class SampleBySample(Patch):
    """Any other module: it runs once for each sample, on the sample's part of the batch, with its weights in place.

    The weights are swapped in by reference; the parameters themselves are never written.
    """

    def __init__(self, sampled: SampledModule, samples: Sequence[int], seed: int) -> None:
        super().__init__(sampled, samples)
        self.seed = seed
        self._weights = sampled.weights
        gaussians = {weight.name: weight.gaussian for weight in sampled.weights}
        # Stacks are made under inference_mode too, whose tensors could not be written by a later pass outside of it.
        with torch.inference_mode(False):
            self._scratch = {
                weight.name: nn.Parameter(torch.empty_like(weight.param), requires_grad=False)
                for weight in sampled.weights
            }
            self._placement = Placement(gaussians, self._scratch, None)
        copies = sum(gaussian.mean.nbytes + gaussian.hess.nbytes for gaussian in gaussians.values())  # the placement's
        self.nbytes = sum(scratch.nbytes for scratch in self._scratch.values()) + copies

    def install(self) -> None:
        """Take the place of forward(), and of the hooks before it.

        They may make weights (weight_norm, spectral_norm and pruning of the old kind), and then of each sample's.
        """
        super().install()
        self._pre_hooks = self.module._forward_pre_hooks
        self.module._forward_pre_hooks = OrderedDict()

    def remove(self) -> None:
        """Give both back."""
        super().remove()
        self.module._forward_pre_hooks = self._pre_hooks

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As torch calls hooks and forward()."""
        for number, hook in list(self._pre_hooks.items()):
            if number in self.module._forward_pre_hooks_with_kwargs:
                both = hook(self.module, args, kwargs)
                args, kwargs = (args, kwargs) if both is None else both
            else:
                changed = hook(self.module, args)
                args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
        return self.forward(*args, **kwargs)

    def run(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chunk = rows // len(self.samples)
        memory = {scratch.untyped_storage().data_ptr() for scratch in self._scratch.values()}
        outputs = []

        def kept(tensor: Tensor) -> Tensor:
            """The next sample goes to the same memory: what a module returns of its weights is copied."""
            return tensor.clone() if tensor.untyped_storage().data_ptr() in memory else tensor

        with self._scratch_in_place():
            for position, sample in enumerate(self.samples):
                self._placement.put(self.seed, sample)

                def part(tensor: Tensor, start: int = position * chunk) -> Tensor:
                    return tensor[start : start + chunk] if tensor.dim() and tensor.shape[0] == rows else tensor

                chunk_args, chunk_kwargs = map_tensors(part, (args, kwargs))
                outputs.append(map_tensors(kept, self._forward(chunk_args, chunk_kwargs)))
        self._check_outputs(outputs[0], chunk)
        return concatenate(outputs)

    @contextlib.contextmanager
    def _scratch_in_place(self) -> Iterator[None]:
        places = [(weight.owner._parameters, weight.key, weight) for weight in self._weights]
        # Not by setattr, which registers a new parameter each time, with its checks and everybody's hooks.
        for params, key, weight in places:
            params[key] = self._scratch[weight.name]
        try:
            yield
        finally:
            for params, key, weight in places:
                params[key] = weight.param
            caches.clear()

    def _check_outputs(self, output: Any, chunk: int) -> None:
        for tensor in tensors(output):
            if tensor.dim() == 0 or tensor.shape[0] != chunk:
                raise CannotStackError(
                    f"{self.path} ({type(self.module).__name__}) returned {tuple(tensor.shape)} for a batch of "
                    f"{chunk}: the first dimension is not the batch, so that samples cannot be stacked in it"
                )
