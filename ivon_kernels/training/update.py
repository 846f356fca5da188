"""Takes the step: what the ranks and devices agree on, the launch of the update, and steps that are skipped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ivon_kernels.backends import DeviceBackend, Guard, Launch
from ivon_kernels.backends.state import BAD
from ivon_kernels.training import replicas
from ivon_kernels.training.checks import NonFiniteGradientError
from ivon_kernels.training.samples import Samples, check, first_nonfinite

__all__ = ["UNSCALED", "Scaling", "Update"]


class Scaling(NamedTuple):
    """What a GradScaler left on the optimizer: whether it saw an overflow, and the scale the gradients still carry."""

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


UNSCALED = Scaling()


class Update:
    """From the gradients of the samples to the next mean. The host decides whether to step, or the devices do.

    Args:
        samples: Of the step.

    Attributes:
        skipped: Steps that the host skipped. Devices count their own.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.skipped = 0

    def resume(self, skipped: int) -> None:
        """Go on counting."""
        self.skipped = skipped

    def take(self, scaling: Scaling, *, draw_next: bool, may_be_empty: bool) -> None:
        """Update the posterior; the weights get the new mean.

        Args:
            scaling: Of a GradScaler.
            draw_next: Let the weights get the first sample of the next step instead.
            may_be_empty: No gradient has to be there: a closure may decide to skip its batch.

        Raises:
            RuntimeError: If no sample was drawn, or no parameter has ever had a gradient.
            NonFiniteGradientError: For inf or nan in a gradient, with ``nonfinite="raise"`` and without a GradScaler.
        """
        samples = self.samples
        if not samples.count:
            raise RuntimeError(
                "step() without a sample: run forward and backward inside 'with optimizer.sampled_params(train=True)', "
                "or call optimizer.train() before the forward pass"
            )
        if scaling.found_inf is not None:
            self._require_scale(scaling)
        if samples.replicas > 1:
            scaling = self._share(scaling)
        launches = samples.gather()
        if not may_be_empty:
            self._require_gradients()
        if samples.parameters.on_device:
            self._on_device(launches, scaling, draw_next)
            self.raise_reported()
        else:
            self._on_host(launches, scaling, draw_next)

    def raise_reported(self) -> None:
        """Raise if a device has skipped a step since the last look, for a gradient that is not finite.

        The host does not wait for the device, so it may learn of it a step or more later.
        """
        parameters = self.samples.parameters
        if not parameters.flags:
            return
        reports = [flags.new_report() for flags in parameters.flags.values()]  # devices may report the same step
        index = next((report for report in reports if report is not None), None)
        if index is not None:
            self.samples.discard()
            name = next((state.name for state in parameters.ordered if state.index == index), f"parameter {index}")
            raise _nonfinite_error(name, "the device did not take that step")

    # ---- before it -----------------------------------------------------------------------------------------------

    def _require_scale(self, scaling: Scaling) -> None:
        if scaling.grad_scale is None and self.samples.folded:
            raise RuntimeError(
                "GradScaler.unscale_ unscales the last MC sample only; with several samples per step call "
                "scaler.step(optimizer) without unscale_"
            )

    def _share(self, scaling: Scaling) -> Scaling:
        """Add up the samples of all ranks (``sync=True``); where one rank must skip the step, all do.

        The sums are free of `grad_scale` then: GradScalers that see different gradients have different scales.
        """
        samples, (found_inf, grad_scale) = self.samples, scaling
        samples.fold()  # only sums can be added up: gradients of ranks with noise of their own are not comparable
        if grad_scale is not None:
            scale = float(grad_scale)
            for state in samples.parameters.active.states:
                if state.sums is not None:
                    gradsq = samples.parameters.groups[state.group]["hess_approx"] == "gradsq"
                    state.sums[0].div_(scale)
                    state.sums[1].div_(scale * scale if gradsq else scale)
        bad = samples.share(found_inf is not None and bool(found_inf))
        return Scaling(None if found_inf is None else torch.tensor(bad, dtype=torch.bool, device="cpu"))

    def _require_gradients(self) -> None:
        """Refuse the steps of an optimizer whose parameters have never had a gradient; later steps may skip all."""
        samples = self.samples
        trained = len(samples.parameters.active.states)
        if not samples.had_gradients and trained:
            samples.discard()
            raise RuntimeError(
                f"none of the optimizer's {trained} parameters has had a gradient: call backward() "
                "before step(); if it was called, the model trains other parameters than the optimizer, which has "
                "to be built after fully_shard(), to_empty() and whatever else replaces parameters"
            )

    @property
    def _shards_decide(self) -> bool:
        """Whether ranks have to agree on skipping a step: each sees the gradients of its own shards only."""
        return self.samples.parameters.active.sharded and self.samples.nonfinite == "skip"

    # ---- the host decides ----------------------------------------------------------------------------------------

    def _on_host(self, launches: list[Launch], scaling: Scaling, draw_next: bool) -> None:
        found_inf, grad_scale = scaling
        bad = self._find_nonfinite(launches)
        if bad is not None and self.samples.nonfinite == "raise" and found_inf is None:
            self.samples.discard()
            raise _nonfinite_error(bad, "the step was not taken")
        if bad is not None or (found_inf is not None and bool(found_inf)):
            self._skip(keep_sample=draw_next)
            return
        samples = self.samples
        # Dividing by the scale is part of the kernel's scalars: the gradients themselves stay as backward left them.
        amp_scale = 1.0 if grad_scale is None else float(grad_scale)
        parameters = samples.parameters
        parameters.scalars.update(parameters.groups, amp_scale, samples.of_all_ranks or samples.count)
        draw, adopt = samples.draw, samples.weights.held is None
        for launch in launches:
            launch.backend.step(launch, draw, adopt, draw_next)
        self._finish(launches, draw_next)

    def _find_nonfinite(self, launches: list[Launch]) -> str | None:
        """Name of a parameter whose gradient of any sample holds inf or nan."""
        samples = self.samples
        if samples.nonfinite == "ignore":
            return None
        bad = first_nonfinite(launches)
        bad = samples.bad or bad
        # A rank that skips alone would leave its shards a step behind the others'.
        if self._shards_decide:
            device = samples.parameters.active.states[0].mean.device
            if replicas.any_rank(bad is not None, device):
                bad = bad or "a shard on another rank"
        return bad

    def _skip(self, keep_sample: bool) -> None:
        """Leave state and counters as they are; the next step draws the same samples again."""
        self.skipped += 1
        samples = self.samples
        if not keep_sample or samples.folded:
            samples.discard()
            if keep_sample:
                samples.begin()

    # ---- the devices decide --------------------------------------------------------------------------------------

    def _on_device(self, launches: list[Launch], scaling: Scaling, draw_next: bool) -> None:
        """Launch the step; the devices skip it if a gradient is not finite or `found_inf` says so."""
        samples, (found_inf, grad_scale) = self.samples, scaling
        parameters = samples.parameters
        parameters.check_capture()
        if found_inf is None and samples.nonfinite != "ignore" and samples.folded < samples.count:
            check(launches)
        parameters.scalars.update(parameters.groups, 1.0, samples.count)
        draw, adopt = samples.draw, samples.weights.held is None
        report = samples.nonfinite == "raise" and found_inf is None
        if self._shards_decide and found_inf is None:
            for flags in parameters.flags.values():
                replicas.smallest_of_all_ranks(flags.block[BAD])
        devices = [launch.states[0].mean.device for launch in launches]
        if len(set(devices)) > 1:
            self._share_findings(devices)
        for number, launch in enumerate(launches):
            assert isinstance(launch.backend, DeviceBackend)
            # The final launch on a device forgets what the checks found: earlier ones must not, as they share it.
            final = devices[number] not in devices[number + 1 :]
            guard = Guard(_on(devices[number], found_inf), _on(devices[number], grad_scale), report, final)
            launch.backend.step(launch, draw, adopt, draw_next, guard)
        self._finish(launches, draw_next)

    def _share_findings(self, devices: list[torch.device]) -> None:
        """Let every device of this step know what the others found, without waiting; its final launch forgets it."""
        blocks = [self.samples.parameters.flags[device].block for device in dict.fromkeys(devices)]
        first = torch.stack([block[BAD].to(blocks[0].device, non_blocking=True) for block in blocks]).amin()
        for block in blocks:
            block[BAD].copy_(first, non_blocking=True)

    # ---- after it ------------------------------------------------------------------------------------------------

    def _finish(self, launches: list[Launch], draw_next: bool) -> None:
        """Restore what was sampled and has no gradient, and settle what the weights hold."""
        active = self.samples.parameters.active
        # The kernel has written the mean of what it stepped; what had no gradient still holds its sample.
        if self.samples.weights.held is not None and not draw_next and launches is not active.launches:
            stepped = {state for launch in launches for state in launch.states}
            for launch in active.part([state for state in active.states if state not in stepped]):
                launch.backend.restore(launch)
        self.samples.finish(next_drawn=draw_next)


def _nonfinite_error(name: str, consequence: str) -> NonFiniteGradientError:
    return NonFiniteGradientError(
        f"the gradient of {name} holds inf or nan; {consequence} and nothing was changed "
        "(nonfinite='skip' skips such steps)"
    )


def _on(device: torch.device, flag: Tensor | None) -> Tensor | None:
    return None if flag is None else flag.to(device, non_blocking=True)
