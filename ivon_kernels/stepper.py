"""Takes the step: what the ranks and devices agree on, the launch of the update, and steps that are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ivon_kernels.backends import DeviceBackend, Guard
from ivon_kernels.backends.device import BAD
from ivon_kernels.engine import Engine, Launches
from ivon_kernels.gradients import EarlierGradient, NonFiniteGradientError
from ivon_kernels.training import replicas as distributed

Closure = Callable[[], Any]


class Stepper(Engine):
    """From the gradients of the samples to the next mean."""

    _in_closure: bool

    def _step_on_host(
        self, launches: Launches, draw_next: bool, found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        bad = self._find_nonfinite(launches)
        if bad is not None and self.nonfinite == "raise" and found_inf is None:
            self.discard_samples()
            raise self._nonfinite_error(bad, "the step was not taken")
        if bad is not None or (found_inf is not None and bool(found_inf)):
            self._skipped += 1
            self._skip(keep_sample=draw_next)
        else:
            self._update(launches, 1.0 if grad_scale is None else float(grad_scale), draw_next)

    @staticmethod
    def _nonfinite_error(name: str, consequence: str) -> NonFiniteGradientError:
        return NonFiniteGradientError(
            f"the gradient of {name} holds inf or nan; {consequence} and nothing was changed "
            "(nonfinite='skip' skips such steps)"
        )

    def _raise_reported(self) -> None:
        """Raise if a device has skipped a step since the last look, for a gradient that is not finite.

        The host does not wait for the device, so it may learn of it a step or more later.
        """
        reports = [control.new_report() for control in self._controls.values()]  # devices may report the same step
        index = next((report for report in reports if report is not None), None)
        if index is not None:
            self.discard_samples()
            name = next((slot.name for slot in self._ordered if slot.index == index), f"parameter {index}")
            raise self._nonfinite_error(name, "the device did not take that step")

    def _run_closure(self, closure: Closure) -> Any:
        losses: list[Any] = []
        self._in_closure = True
        try:
            for number in range(self.param_groups[0]["mc_samples"]):
                drawn = bool(number) or self._held is None
                if drawn:
                    self._begin_sample()
                earlier = EarlierGradient(self._active_params) if drawn else None
                with torch.enable_grad():
                    loss = closure()
                if drawn and self._samples.count > 1 and all(p.grad is None for p in self._active_params):
                    self._abort_sample()
                    losses = losses or [loss]
                    break
                if earlier is not None and earlier.kept():
                    raise RuntimeError(
                        "step(closure) drew a sample, but the closure did not clear the gradients from before it: "
                        "clear them, or call optimizer.train() before the first backward pass of the step (in "
                        "Lightning, IVONCallback of ivon_kernels.integrations.lightning does that)"
                    )
                losses.append(loss)
        except BaseException:
            self.discard_samples()
            raise
        finally:
            self._in_closure = False
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    def _scaler_flags(self) -> tuple[Tensor | None, Tensor | None]:
        """What a GradScaler left here: whether it saw an overflow, and the scale that the gradients still carry."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if found_inf is not None and grad_scale is None and self._samples.folded:
            raise RuntimeError(
                "GradScaler.unscale_ unscales the last MC sample only; with several samples per step call "
                "scaler.step(optimizer) without unscale_"
            )
        return found_inf, grad_scale if found_inf is not None else None

    def _gather(self) -> Launches:
        """The launches of this step: the slots with a gradient of any sample."""
        samples = self._samples
        self._catch_up()
        if samples.folded < samples.count:
            launches = self._launches_with_gradients()
        else:
            launches = self._point_to_slots([slot for slot in self._active_slots if slot.summed])
        for _, part in launches:
            part.summed = samples.folded > 0
        self._had_gradients |= bool(launches)
        return launches

    def _require_gradients(self, launches: Launches) -> None:
        """Refuse the steps of an optimizer whose parameters have never had a gradient; later steps may skip all."""
        if not self._had_gradients and self._active_slots:
            self.discard_samples()
            raise RuntimeError(
                f"none of the optimizer's {len(self._active_slots)} parameters has had a gradient: call backward() "
                "before step(); if it was called, the model trains other parameters than the optimizer, which has "
                "to be built after fully_shard(), to_empty() and whatever else replaces parameters"
            )

    def _share_samples(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> Tensor | None:
        """Add up the samples of all ranks (``sync=True``); where one rank must skip the step, all do.

        The sums are free of `grad_scale` then: GradScalers that see different gradients have different scales.

        Returns:
            The overflow flag of all ranks, if they have one.

        Raises:
            RuntimeError: If the gradients were averaged over the ranks before.
        """
        samples = self._samples
        self._fold()
        if grad_scale is not None:
            scale = float(grad_scale)
            for slot in self._active_slots:
                if slot.sums is not None:
                    gradsq = self.param_groups[slot.group]["hess_approx"] == "gradsq"
                    slot.sums[0].div_(scale)
                    slot.sums[1].div_(scale * scale if gradsq else scale)
        bad = samples.nonfinite is not None or (found_inf is not None and bool(found_inf))
        shared = distributed.share_samples(self._active_slots, samples.count, bad)
        if shared.averaged:
            self.discard_samples()
            raise RuntimeError(distributed.AVERAGED)
        samples.of_all_ranks = shared.samples
        if shared.bad:
            samples.nonfinite = samples.nonfinite or "a parameter on another rank"
        return None if found_inf is None else torch.tensor(shared.bad, dtype=torch.bool)

    def _find_nonfinite(self, launches: Launches) -> str | None:
        """Name of a parameter whose gradient of any sample holds inf or nan."""
        if self.nonfinite == "ignore":
            return None
        bad = self._first_nonfinite(launches)
        bad = self._samples.nonfinite or bad
        if self._shards_decide and distributed.any_rank(bad is not None, self._active_slots[0].mean.device):
            bad = bad or "a shard on another rank"
        return bad

    @property
    def _shards_decide(self) -> bool:
        """Whether ranks have to agree on skipping a step: each sees the gradients of its own shards only."""
        return self._sharded and self.nonfinite == "skip"

    def _update(self, launches: Launches, amp_scale: float, draw_next: bool) -> None:
        """Take the step that the host has decided on."""
        self._rows.update(self.param_groups, amp_scale, self._samples.of_all_ranks or self._samples.count)
        draw, held = self._train_draw(), self._held is not None
        for backend, part in launches:
            backend.step(part, draw, adopt=not held, draw_next=draw_next)
        self._after_step(launches, draw_next)

    def _update_on_device(
        self, launches: Launches, draw_next: bool, found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        """Launch the step; the devices skip it if a gradient is not finite or `found_inf` says so."""
        self._check_capture()
        if found_inf is None and self.nonfinite != "ignore" and self._samples.folded < self._samples.count:
            self._check(launches)
        self._rows.update(self.param_groups, 1.0, self._samples.count)
        draw, held = self._train_draw(), self._held is not None
        report = self.nonfinite == "raise" and found_inf is None
        if self._shards_decide and found_inf is None:
            for control in self._controls.values():
                distributed.smallest_of_all_ranks(control.block[BAD])
        devices = [part.slots[0].mean.device for _, part in launches]
        if len(set(devices)) > 1:
            self._share_findings(devices)
        for number, (backend, part) in enumerate(launches):
            assert isinstance(backend, DeviceBackend)
            final = devices[number] not in devices[number + 1 :]
            guard = Guard(_on(devices[number], found_inf), _on(devices[number], grad_scale), report, final)
            backend.step(part, draw, adopt=not held, draw_next=draw_next, guard=guard)
        self._after_step(launches, draw_next)

    def _share_findings(self, devices: list[torch.device]) -> None:
        """Let every device of this step know what the others found, without waiting; its final launch forgets it."""
        blocks = [self._controls[device].block for device in dict.fromkeys(devices)]
        first = torch.stack([block[BAD].to(blocks[0].device, non_blocking=True) for block in blocks]).amin()
        for block in blocks:
            block[BAD].copy_(first, non_blocking=True)

    def _after_step(self, launches: Launches, draw_next: bool) -> None:
        if self._held is not None and not draw_next and launches is not self._active:
            stepped = {slot for _, part in launches for slot in part.slots}
            for backend, part in self._launches([slot for slot in self._active_slots if slot not in stepped]):
                backend.restore(part)
        self._announce(self._active_params, self._fsdp)
        self._forget_samples(findings=False)  # the final launch did that
        if draw_next:
            self._samples.count, self._samples.unused = 1, True
            self._held = self._train_draw()
            self._note_sample()
        else:
            self._let_go()

    def _skip(self, keep_sample: bool) -> None:
        """Leave state and counters as they are; the next step draws the same samples again."""
        if not keep_sample or self._samples.folded:
            self._restore()
            self._forget_samples()
            if keep_sample:
                self._begin_sample()


def _on(device: torch.device, flag: Tensor | None) -> Tensor | None:
    return None if flag is None else flag.to(device, non_blocking=True)
