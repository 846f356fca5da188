"""Passes of a model under samples of a posterior: several of them at a time where they can be stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ivon_kernels import lora
from ivon_kernels.gaussians.gaussians import Gaussians

T = TypeVar("T")


class Pass(NamedTuple):
    """What the weights hold for one pass of the model."""

    samples: int
    stack: lora.Stack | None

    def repeat(self, inputs: Any) -> Any:
        """The inputs of the pass: those of one sample, once for each, all rows of the first sample first."""
        return inputs if self.stack is None else self.stack.repeat(inputs)


class Sampler:
    """Puts samples of a posterior into a model.

    A stack stays in the model, and is told which samples the next pass is for.

    Args:
        posterior: Where the samples come from.
        model: The model that runs under them.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.
        stacked: Whether several samples share a pass. None: in LoRA models that allow it.
        max_rows: The most rows of a pass that more than one sample shares.
    """

    def __init__(
        self, posterior: Gaussians, model: nn.Module, *, adapter: str | None, stacked: bool | None, max_rows: int | None
    ) -> None:
        self.model = model
        self._posterior, self._adapter, self._max_rows = posterior, adapter, max_rows
        self._required = stacked is True
        self._stacked = _is_lora(model, adapter) if stacked is None else stacked
        self._open = ExitStack()
        self._stack: lora.Stack | None = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack = None
        self._open.__exit__(kind, error, traceback)

    def attempt(self, run: Callable[[], T]) -> T:
        """What `run` returns, which goes through passes of this sampler and may be called again, with separate ones.

        Raises:
            lora.CannotStackError: If the model cannot be stacked, which a pass finds out, and stacking was asked for.
        """
        try:
            return run()
        except lora.CannotStackError as error:
            if self._required or not self._stacked:
                raise
            self._stacked, self._stack = False, None
            self._open.__exit__(type(error), error, error.__traceback__)  # as a pass that did not finish
        return run()

    def passes(self, numbers: tuple[int, ...], rows: int) -> Iterator[Pass]:
        """The passes that a batch of `rows` needs; each holds until the next one is asked for.

        Args:
            numbers: The samples; none is the mean.
            rows: Of the batch, for one sample.
        """
        if not numbers:
            self._leave()
            self._open.enter_context(self._posterior.at_mean(self.model, adapter=self._adapter))
            yield Pass(1, None)
            self._leave()
            return
        for group in self._groups(numbers, rows):
            if len(group) > 1 and self._restack(group):
                yield Pass(len(group), self._stack)
                continue
            for number in group:
                self._leave()
                self._open.enter_context(self._posterior.sampled(self.model, sample=number, adapter=self._adapter))
                yield Pass(1, None)
            self._leave()

    def _leave(self) -> None:
        # Not by `with` in the generator above: one that an exception left is closed when its traceback goes, and the
        # weights would hold the sample until then.
        self._stack = None
        self._open.close()

    def _groups(self, numbers: tuple[int, ...], rows: int) -> list[tuple[int, ...]]:
        """`numbers` in groups of as many as fit into one pass, as equal as they can be."""
        count = 1 if self._stacked else len(numbers)
        if self._stacked and self._max_rows is not None:
            count = -(-len(numbers) // max(1, self._max_rows // max(1, rows)))
        ends = [(i + 1) * len(numbers) // count for i in range(count)]
        return [numbers[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _restack(self, group: tuple[int, ...]) -> bool:
        """Have this group's stack in the model; False where it does not take one and need not."""
        if not self._stacked:
            return False
        if self._stack is not None:
            self._stack.select(group)
            return True
        self._leave()
        # Whether a model can be stacked is only known when it is tried; without being asked for, separate passes do.
        try:
            stack = lora.stack(self.model, self._posterior, group, adapter=self._adapter)
        except ValueError:
            if self._required:
                raise
            self._stacked = False
            return False
        self._stack = self._open.enter_context(stack)
        return True


def _is_lora(model: nn.Module, adapter: str | None) -> bool:
    configs = getattr(model, "peft_config", None) or {}
    chosen = [config for name, config in configs.items() if adapter in (None, name)]
    return any(config.peft_type == "LORA" for config in chosen)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: to its first parameter."""
    return next((param.device for param in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not model.train(), which would set every module: of a model that is trained, frozen parts may be in eval mode.
        for module in training:
            module.training = True
