"""Pickling and copying an optimizer: what its parts know in one record, and the parts again from it.

The only place where the state of the parts is read and set from outside. State dicts are another thing: they hold what
was learned, between two steps; a copy goes on in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ivon_kernels.backends import Draw
from ivon_kernels.training.modes import Modes
from ivon_kernels.training.samples import NonFinite, Samples
from ivon_kernels.training.update import Update

__all__ = ["Parts", "pack", "unpack"]


class Parts(NamedTuple):
    """What the parts of an optimizer know, besides ``param_groups`` and ``state``."""

    backend: str | None
    nonfinite: NonFinite
    seed_given: bool
    skipped: int  # steps, on all devices
    held: Draw | None
    samples: dict[str, Any]  # arguments of Samples.resume
    modes: dict[str, Any]  # of Modes.resume
    sums: dict[int, tuple[Tensor, Tensor]]  # of the finished samples, by the parameter's index
    active: list[int]  # indices of the parameters that were sampled
    findings: list[int]
    antithetic: bool


def pack(samples: Samples, modes: Modes, update: Update) -> Parts:
    """Everything that is needed to go on. Waits for devices that count skipped steps.

    Raises:
        RuntimeError: If the noise of the sample under way is numbered in another way than a copy would number it.
    """
    parameters = samples.parameters
    if not parameters.numbered and not samples.is_idle:
        raise RuntimeError(
            "parameters were added to the optimizer, or taken out, since this step's sample was drawn: copy or pickle "
            "it after step(), or call discard_samples() first"
        )
    return Parts(
        backend=parameters.backend,
        nonfinite=samples.nonfinite,
        seed_given=samples.seed_given,
        skipped=update.skipped + sum(flags.skipped() for flags in parameters.flags.values()),
        held=samples.weights.held,
        samples={
            "count": samples.count,
            "replay": samples.replay,
            "folded": samples.folded,
            "bad": samples.bad,
            "in_closure": samples.in_closure,
            "had_gradients": samples.had_gradients,
        },
        modes={"training": modes.training, "evaluating": modes.evaluating, "evaluated": modes.evaluated},
        sums={state.index: state.sums for state in parameters.ordered if state.sums is not None},
        active=[state.index for state in parameters.active.states],
        findings=samples.findings(),
        antithetic=samples.antithetic,
    )


def unpack(
    parts: Parts, state: Mapping[Tensor, Mapping[str, Any]], samples: Samples, modes: Modes, update: Update
) -> None:
    """Give new parts, whose parameters are bound to the copied groups, what the record knows.

    Args:
        parts: From :func:`pack`; its tensors may be on other devices now.
        state: The copied ``optimizer.state``; the parameters get theirs from it.
        samples, modes, update: Just made.
    """
    parameters = samples.parameters
    parameters.hold_lr()
    parameters.load(state)
    states = {state.index: state for state in parameters.ordered}
    parameters.activate([states[index] for index in parts.active])
    parameters.carry_over(parts.sums)
    if parts.findings:
        for flags in parameters.flags.values():
            flags.forget(*parts.findings)
    samples.resume(**parts.samples)
    modes.resume(**parts.modes)
    update.resume(parts.skipped)
    if parts.held is not None:
        samples.weights.settle(parameters.active, parts.held)
