"""Samples of a posterior stacked in the batch of a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.lora.guard import guard, unguard
from ivon_kernels.lora.modules import find_modules
from ivon_kernels.lora.op import BACKENDS
from ivon_kernels.lora.patches import FusedLora, Patch, SampleBySample
from ivon_kernels.noise import MIRROR
from ivon_kernels.tree import map_tensors

__all__ = ["Stack", "stack"]


def stack(
    model: nn.Module,
    posterior: Gaussians,
    samples: int | Sequence[int] = 10,
    *,
    adapter: str | None = None,
    backend: str | None = None,
) -> Stack:
    """Let one forward pass of a model compute several posterior samples, stacked in the batch.

    ::

        with torch.inference_mode(), lora.stack(model, posterior, samples=10) as stack:
            logits = stack.split(model(**stack.repeat(batch)).logits)  # [10, batch, ...]

    The rows of sample k get the logits of a pass under ``posterior.sampled(model, sample=k)``, up to the rounding of
    products that are computed in another order. LoRA linear layers of PEFT (on float, 8-bit and 4-bit bases) run their
    base layer once for all samples and add ``x A_s^T B_s^T`` by a kernel. All other modules with weights in the
    posterior (LoRA on embeddings and convolutions, DoRA, ``modules_to_save``, a fully trained model) run once for each
    sample. The model's own values of these weights are neither used nor written.

    Limits: every module with posterior weights must see the batch as its first dimension, in the order in which it came
    (tokens may be flattened into it). A model that regroups rows, such as a mixture of experts whose expert layers are
    called with the tokens routed to them, or that reads a module's weights without calling it, cannot be stacked;
    modules that were never called are named by a warning at the end. For prediction only: no gradients.

    Args:
        model: The model, with the adapter that the posterior is about. A PEFT model, or any other that the posterior
            fits.
        posterior: Where the samples come from.
        samples: How many, numbered from 0, or their numbers.
        adapter: The adapter that has the posterior's weights; None: its own, else the active one.
        backend: Of :func:`lora_samples_`, for the LoRA linear layers.

    Returns:
        A handle, already active: ``stack.remove()``, or the end of a ``with`` block, undoes everything.

    Raises:
        ValueError: If the posterior does not fit the model, the model cannot be stacked (it is compiled, or a weight
            belongs to a module without a batch to divide), or `samples` or `backend` is none.
        RuntimeError: If samples are stacked in the model already, or the adapter is merged, disabled or not active.
        CannotStackError: In a pass, if something computes with a stacked weight outside of the module that runs with
            its samples, or a module's batch cannot be divided. It is a ValueError.
    """
    return Stack(model, posterior, samples, adapter=adapter, backend=backend)


class Stack:
    """Samples stacked in a model: see :func:`stack`.

    Attributes:
        samples: The samples' numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Gaussians,
        samples: int | Sequence[int] = 10,
        *,
        adapter: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.samples = _numbers(samples)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}, or None")
        _check_model(model)
        seed = posterior.seed
        gaussians, self._params = posterior.places_in(model, adapter)
        self._patches: list[Patch] = [
            SampleBySample(sampled, self.samples, seed)
            if weights is None
            else FusedLora(sampled, weights, self.samples, seed, backend)
            for sampled, weights in find_modules(model, self._params, gaussians)
        ]
        for patch in self._patches:
            patch.install()
        guard(self._params)

    @property
    def nbytes(self) -> int:
        """Bytes that stacking has allocated, until it is undone.

        In LoRA linear layers it is ``1 / sigma`` of every weight, 4 bytes each, and the mean on a device where the
        posterior is not. For other modules it is one sample, and copies of mean and Hessian.
        """
        return sum(patch.nbytes for patch in self._patches)

    @property
    def fused(self) -> int:
        """How many LoRA layers run by the kernel; the other modules run sample by sample."""
        return sum(isinstance(patch, FusedLora) for patch in self._patches)

    def select(self, samples: int | Sequence[int]) -> None:
        """Go on with other samples, perhaps more or fewer of them; what was prepared serves these too.

        Args:
            samples: As for :func:`stack`.

        Raises:
            ValueError: If `samples` is none.
        """
        self.samples = _numbers(samples)
        for patch in self._patches:
            patch.samples = self.samples

    def repeat(self, inputs: Any) -> Any:
        """The same inputs for every sample: ``[batch, ...]`` becomes ``[samples * batch, ...]``, sample by sample.

        Args:
            inputs: A tensor, or tensors nested in dicts (BatchEncoding, ...), lists and tuples. Scalars and what is no
                tensor stay as they are.
        """
        count = len(self.samples)
        return map_tensors(lambda t: t.repeat(count, *[1] * (t.dim() - 1)) if t.dim() else t, inputs)

    def split(self, output: Any) -> Any:
        """What the model returned, sample by sample: ``[samples * batch, ...]`` becomes ``[samples, batch, ...]``.

        Args:
            output: A tensor, or tensors nested as for :meth:`repeat`. Scalars and what is no tensor stay as they are.

        Raises:
            ValueError: If a tensor's first dimension is no multiple of the number of samples.
        """
        return map_tensors(self._split, output)

    def _split(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        count = len(self.samples)
        if tensor.shape[0] % count:
            raise ValueError(f"{tuple(tensor.shape)} cannot be split: the first dimension is no multiple of {count}")
        return tensor.reshape(count, tensor.shape[0] // count, *tensor.shape[1:])

    def remove(self) -> None:
        """Undo everything; again is free.

        Warns:
            UserWarning: If modules with posterior weights were not called, though others were: their samples had no
                effect.
        """
        patches = self._undo()
        idle = [patch.path for patch in patches if not patch.calls]
        if 0 < len(idle) < len(patches):
            warnings.warn(
                f"{len(idle)} of {len(patches)} modules with posterior weights were not called while samples were "
                f"stacked ({', '.join(idle[:3])}{', ...' if len(idle) > 3 else ''}): their samples had no effect",
                stacklevel=2,
            )

    def __enter__(self) -> Stack:
        if not self._patches:
            raise RuntimeError("this stack was removed: make another one by lora.stack()")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.remove()
        else:  # the pass did not finish, so that nothing can be said about modules that were not called
            self._undo()

    def _undo(self) -> list[Patch]:
        patches, self._patches = self._patches, []
        for patch in reversed(patches):
            patch.remove()
        if patches:
            unguard(self._params.values())
        return patches


def _numbers(samples: int | Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(range(samples)) if isinstance(samples, int) else tuple(int(sample) for sample in samples)
    if not numbers or min(numbers) < 0 or max(numbers) >= 2 * MIRROR:
        raise ValueError(f"samples={samples!r}: give how many, at least 1, or numbers in 0 .. {2 * MIRROR - 1}")
    return numbers


def _check_model(model: nn.Module) -> None:
    """Refuse models whose forward() cannot be exchanged, or has been already."""
    for path, module in model.named_modules():
        # torch.compile(model) wraps it; model.compile() leaves the model and keeps the compiled call inside.
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError("the model is compiled, and would go on as it was: stack samples before torch.compile")
        if isinstance(module, nn.DataParallel):
            raise ValueError("DataParallel makes copies of the model for every pass: stack samples in model.module")
        if isinstance(vars(module).get("forward"), Patch):
            raise RuntimeError("samples are stacked in this model already: call remove() of the other stack first")
        if getattr(module, "merged_adapters", None):
            raise RuntimeError(f"{path}: an adapter is merged into the base weights: call unmerge_adapter() first")
