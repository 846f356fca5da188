"""Puts samples into the weights, collects their gradients, and launches the update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ivon_kernels import distributed
from ivon_kernels.arena import Slot, SlotList
from ivon_kernels.backends import Backend, DeviceBackend, Draw, Guard
from ivon_kernels.backends.device import BAD
from ivon_kernels.gradients import Samples
from ivon_kernels.parameters import ParameterStore

_MAX_SAMPLES = 2**16
Launches = list[tuple[Backend, SlotList]]


class Engine(ParameterStore):
    """The moves between the states of an optimizer: mean in the weights, a sample in them, samples waiting for a step.

    ``_held`` says what the weights hold (None: the mean) and ``_samples`` what was drawn since the last step.
    """

    @property
    def _replicas(self) -> int:
        """How many ranks draw noise of their own."""
        return distributed.world()[1] if self.sync else 1

    def _train_draw(self) -> Draw:
        """The last sample of the coming step."""
        return Draw(self.seed, self._samples.count - 1, distributed.world()[0] if self._replicas > 1 else 0)

    # ---- what the weights hold -----------------------------------------------------------------------------------

    def _put(self, draw: Draw) -> None:
        """Weights <- mean + sigma eps."""
        adopt = self._held is None
        if adopt:
            self._refresh()
        self._check_capture()
        self._rows.update(self.param_groups)
        for backend, slots in self._active:
            backend.sample(slots, draw, adopt)
        self._held = draw
        increment_version(self._active_params)

    def _restore(self) -> None:
        """Weights <- mean, if they hold a sample."""
        if self._held is None:
            return
        self._catch_up()
        for backend, slots in self._active:
            backend.restore(slots)
        self._held = None
        increment_version(self._active_params)

    def _check_capture(self) -> None:
        """Refuse to be captured by a CUDA graph whose replays would not train."""
        if self.defaults["capturable"]:
            self._hold_lr()
            if not self._on_device:
                raise RuntimeError(
                    "capturable=True needs the triton or the cuda backend for every parameter, and sync=False; "
                    f"the parameters have {self.backends or 'none'}"
                )
        elif self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, but this optimizer was built with capturable=False: its replays would "
                "keep the learning rate of the capture; build it with capturable=True"
            )

    def _catch_up(self) -> None:
        """Follow parameters that moved since they were sampled."""
        if any(slots.moved(trained=False) for _, slots in self._active):
            if self._follow_moves(self._active_slots):
                self._activate([self._slots[slot.param] for slot in self._active_slots])
            self._stale = True

    # ---- the samples of a step -----------------------------------------------------------------------------------

    def _begin_sample(self) -> None:
        """Draw the next MC sample of the coming step, after counting in the gradient of the one before."""
        if self._samples.count == _MAX_SAMPLES:
            raise RuntimeError(f"{_MAX_SAMPLES} samples were drawn without a step(): call step() or discard_samples()")
        self._fold()
        self._samples.count += 1
        try:
            self._put(self._train_draw())
        except BaseException:
            self._samples.count -= 1
            raise

    def _abort_sample(self) -> None:
        """The block failed: its sample does not count, and the mean comes back."""
        self._restore()
        if self._samples.count == 0:  # the block took the step before it failed
            return
        self._samples.count -= 1
        if self._samples.count:  # its gradients must not leak into the next sample's
            for slot in self._active_slots:
                slot.param.grad = None

    def _forget_samples(self, *, findings: bool = True) -> None:
        """No sample was drawn; with `findings` the devices also forget what they found in earlier samples."""
        if self._samples.folded:
            for slot in self._active_slots:
                slot.summed = False
            if findings:
                for control in self._controls.values():
                    control.forget()
        self._samples = Samples()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        """Do not keep gradients alive after their launch."""
        if self._grads_in_slots:
            for slot in self._active_slots:
                slot.grad = None
            self._grads_in_slots = False

    def _fold(self) -> None:
        """Add the gradients of the last sample to the sums, once."""
        samples = self._samples
        if samples.folded == samples.count:
            return
        samples.check_not_zeroed()
        if samples.folded == 0:
            for arena in {slot.arena for slot in self._active_slots}:
                arena.clear_sums()
        self._rows.update(self.param_groups)
        launches = self._launches_with_gradients(only_last=True)
        slots = [slot for _, part in launches for slot in part.slots]
        for slot in slots:
            slot.summed = True
        if self.nonfinite != "ignore":
            if self._on_device:
                self._check(launches)
            else:
                samples.nonfinite = samples.nonfinite or self._first_nonfinite(launches)
        for backend, part in launches:
            part.summed = True
            backend.accumulate(part, self._train_draw())
        for slot in slots:
            slot.param.grad = None
        self._drop_gradients()
        samples.closed.clear()
        samples.folded = samples.count

    # ---- the step ------------------------------------------------------------------------------------------------

    def _launches_with_gradients(self, *, only_last: bool = False) -> Launches:
        """Read the gradients of the last sample. Returns the lists of slots that have one, or sums of earlier ones."""
        missing_or_irregular = [
            True if part.pointers is None else part.pointers.read_grads() != 0 for _, part in self._active
        ]
        if not any(missing_or_irregular):
            return self._active
        self._samples.take(self._active_slots)
        self._grads_in_slots = True
        return self._point_to_slots(
            [slot for slot in self._active_slots if slot.grad is not None or (slot.summed and not only_last)]
        )

    def _point_to_slots(self, slots: list[Slot]) -> Launches:
        """Launches of some of the active slots, with the gradients that the slots hold."""
        launches = self._launches(slots)
        for _, part in launches:
            if part.pointers is not None:
                part.pointers.set_grads([slot.grad for slot in part.slots])
        return launches

    def _gather(self) -> Launches:
        """The launches of this step: the slots with a gradient of any sample."""
        samples = self._samples
        if self._replicas > 1:
            distributed.check_not_averaged(self._active_slots)
            self._fold()
            distributed.share_samples(self._active_slots)
        self._catch_up()
        if samples.folded < samples.count:
            launches = self._launches_with_gradients()
        else:
            launches = self._point_to_slots([slot for slot in self._active_slots if slot.summed])
        for _, part in launches:
            part.summed = samples.folded > 0
        return launches

    @staticmethod
    def _first_nonfinite(launches: Launches) -> str | None:
        found = [(part, backend.find_nonfinite(part)) for backend, part in launches]
        return next((part.slots[position].name for part, position in found if position is not None), None)

    def _find_nonfinite(self, launches: Launches) -> str | None:
        """Name of a parameter whose gradient of any sample holds inf or nan; all ranks agree with ``sync``."""
        if self.nonfinite == "ignore":
            return None
        bad = self._first_nonfinite(launches)
        bad = self._samples.nonfinite or bad
        if bad is None and self._replicas > 1 and not distributed.sums_finite(self._active_slots):
            bad = "a parameter on another rank"
        return bad

    @staticmethod
    def _check(launches: Launches) -> None:
        """Let the devices look for inf and nan; the final launch of the step acts on what they found."""
        for backend, part in launches:
            assert isinstance(backend, DeviceBackend)
            backend.check(part)

    def _update(self, launches: Launches, amp_scale: float, draw_next: bool) -> None:
        """Take the step that the host has decided on."""
        self._rows.update(self.param_groups, amp_scale, self._samples.count * self._replicas)
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
        held = self._held is not None
        whole = launches is self._active
        if held and not draw_next and not whole:
            stepped = {slot for _, part in launches for slot in part.slots}
            for backend, part in self._launches([slot for slot in self._active_slots if slot not in stepped]):
                backend.restore(part)
        if held or whole:
            increment_version(self._active_params)
        else:
            increment_version([slot.param for _, part in launches for slot in part.slots])
        self._forget_samples(findings=False)  # the final launch did that
        self._held = None
        if draw_next:
            self._samples.count, self._samples.unused = 1, True
            self._held = self._train_draw()

    def _skip(self, keep_sample: bool) -> None:
        """Leave state and counters as they are; the next step draws the same samples again."""
        if not keep_sample or self._samples.count != 1:
            self._restore()
            self._forget_samples()
            if keep_sample:
                self._begin_sample()


def _on(device: torch.device, flag: Tensor | None) -> Tensor | None:
    return None if flag is None else flag.to(device, non_blocking=True)
