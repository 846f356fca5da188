"""Puts samples into the weights, collects their gradients, and launches the update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import increment_version

from ivon_kernels import distributed
from ivon_kernels.arena import Slot, SlotList, by_backend
from ivon_kernels.backends import Backend, Draw, StepScalars
from ivon_kernels.gradients import Samples
from ivon_kernels.hyperparameters import step_scalars, validate
from ivon_kernels.parameters import ParameterStore

_MAX_SAMPLES = 2**16


class Engine(ParameterStore):
    """The moves between the states of an optimizer: mean in the weights, a sample in them, samples waiting for a step.

    ``_held`` says what the weights hold (None: the mean) and ``_samples`` what was drawn since the last step.
    """

    @property
    def _replicas(self) -> int:
        """How many ranks draw noise of their own."""
        return distributed.world()[1] if self.param_groups[0]["sync"] else 1

    def _train_draw(self) -> Draw:
        """The last sample of the coming step."""
        return Draw(self.seed, self._samples.count - 1, distributed.world()[0] if self._replicas > 1 else 0)

    def _set_scalars(self, slots: Iterable[Slot], amp_scale: float = 1.0, samples: int = 1) -> None:
        known: dict[tuple[int, int], StepScalars] = {}
        last, scalars = (-1, -1), None
        for slot in slots:
            if slot.step != last[1] or slot.group != last[0]:  # neighbours nearly always share them
                last = (slot.group, slot.step)
                scalars = known.get(last)
                if scalars is None:
                    group = self.param_groups[slot.group]
                    validate(group, f"parameter group {slot.group}")
                    scalars = known[last] = step_scalars(group, slot.step, amp_scale, samples)
            slot.scalars = scalars

    # ---- what the weights hold -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _put(self, draw: Draw) -> None:
        """Weights <- mean + sigma eps."""
        adopt = self._held is None
        if adopt:
            self._refresh()
        self._set_scalars(self._active_slots)
        for backend, slots in self._active:
            backend.sample(slots, draw, adopt)
        self._held = draw
        increment_version(self._active_params)

    @torch.no_grad()
    def _restore(self) -> None:
        """Weights <- mean, if they hold a sample."""
        if self._held is None:
            return
        self._catch_up()
        for backend, slots in self._active:
            backend.restore(slots)
        self._held = None
        increment_version(self._active_params)

    def _catch_up(self) -> None:
        """Follow parameters that moved since they were sampled."""
        if self._follow_moves(self._active_slots, restrided=False):
            self._activate([self._slots[slot.param] for slot in self._active_slots])

    # ---- the samples of a step -----------------------------------------------------------------------------------

    def _begin_sample(self) -> None:
        """Draw the next MC sample of the coming step, after counting in the gradient of the one before."""
        if self._samples.count == _MAX_SAMPLES:
            raise RuntimeError(f"{_MAX_SAMPLES} samples were drawn without a step(): call step() or discard_samples()")
        self._fold()
        self._samples.count += 1
        self._put(self._train_draw())

    def _abort_sample(self) -> None:
        """The block failed: its sample does not count, and the mean comes back."""
        self._restore()
        if self._samples.count == 0:  # the block took the step before it failed
            return
        self._samples.count -= 1
        if self._samples.count:  # its gradients must not leak into the next sample's
            for slot in self._active_slots:
                slot.param.grad = None

    def _forget_samples(self) -> None:
        self._samples = Samples()
        for slot in self._active_slots:
            slot.summed, slot.grad = False, None

    @torch.no_grad()
    def _fold(self) -> None:
        """Add the gradients of the last sample to the sums, once."""
        samples = self._samples
        if samples.folded == samples.count:
            return
        samples.check_not_zeroed()
        if samples.folded == 0:
            for arena in {slot.arena for slot in self._active_slots}:
                arena.clear_sums()
        samples.take(self._active_slots)
        slots = [slot for slot in self._active_slots if slot.grad is not None]
        for slot in slots:
            slot.summed = True
        self._set_scalars(slots)
        launches = self._launches(slots)
        bad = self._first_nonfinite(launches)
        samples.nonfinite = samples.nonfinite or bad
        for backend, part in launches:
            backend.accumulate(part, self._train_draw())
        for slot in slots:
            slot.grad = slot.param.grad = None
        samples.closed.clear()
        samples.folded = samples.count

    # ---- the step ------------------------------------------------------------------------------------------------

    def _launches(self, slots: list[Slot]) -> list[tuple[Backend, SlotList]]:
        return self._active if len(slots) == len(self._active_slots) else by_backend(slots)

    @torch.no_grad()
    def _gather(self) -> list[tuple[Backend, SlotList]]:
        """The launches of this step: the slots with a gradient of any sample, `grad` set to that of the last one."""
        samples = self._samples
        if self._replicas > 1:
            distributed.check_not_averaged(self._active_slots)
            self._fold()
            distributed.share_samples(self._active_slots)
        self._catch_up()
        if samples.folded < samples.count:
            samples.take(self._active_slots)
        return self._launches([slot for slot in self._active_slots if slot.grad is not None or slot.summed])

    @staticmethod
    def _first_nonfinite(launches: list[tuple[Backend, SlotList]]) -> str | None:
        found = [(part, backend.find_nonfinite(part)) for backend, part in launches]
        return next((part.slots[position].name for part, position in found if position is not None), None)

    @torch.no_grad()
    def _find_nonfinite(self, launches: list[tuple[Backend, SlotList]]) -> str | None:
        """Name of a parameter whose gradient of any sample holds inf or nan; all ranks agree with ``sync``."""
        bad = self._first_nonfinite(launches)
        bad = self._samples.nonfinite or bad
        if bad is None and self._replicas > 1 and not distributed.sums_finite(self._active_slots):
            bad = "a parameter on another rank"
        return bad

    @torch.no_grad()
    def _update(self, launches: list[tuple[Backend, SlotList]], amp_scale: float, draw_next: bool) -> None:
        slots = [slot for _, part in launches for slot in part.slots]
        held = self._held is not None
        draw = self._train_draw()
        self._set_scalars(slots, amp_scale, self._samples.count * self._replicas)
        for backend, part in launches:
            backend.step(part, draw, adopt=not held, draw_next=draw_next)
        self._count_step(slots)
        if held and not draw_next and len(slots) < len(self._active_slots):
            stepped = set(slots)
            for backend, part in by_backend([slot for slot in self._active_slots if slot not in stepped]):
                backend.restore(part)
        increment_version(self._active_params if held else [slot.param for slot in slots])
        self._forget_samples()
        self._held = None
        if draw_next:
            self._samples.count = 1
            self._held = self._train_draw()

    def _count_step(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.step += 1
        if len(slots) == len(self._active_slots):
            whole = self._active_arenas
            for arena in whole:
                arena.steps += 1
            slots = [] if sum(len(arena.steps) for arena in whole) == len(slots) else slots
        for slot in slots:
            slot.arena.steps[slot.position] = slot.step

    def _skip(self, keep_sample: bool) -> None:
        """Leave state and counters as they are; the next step draws the same samples again."""
        if not keep_sample or self._samples.count != 1:
            self._restore()
            self._forget_samples()
            if keep_sample:
                self._begin_sample()
