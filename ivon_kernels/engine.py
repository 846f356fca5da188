"""Puts samples into the weights, and collects their gradients."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ivon_kernels import holders
from ivon_kernels.backends import Backend, DeviceBackend, Draw
from ivon_kernels.backends.state import Launch, ParamState
from ivon_kernels.gradients import Samples
from ivon_kernels.noise import EVAL_STEP, MAX_SAMPLES
from ivon_kernels.store import Store
from ivon_kernels.training import replicas as distributed

Launches = list[tuple[Backend, Launch]]

_WATCHED = 8  # parameters, at most
_VERSION_OF = operator.attrgetter("_version")
EDITED = (
    "the weights were written while they held a sample, by another optimizer or by load_state_dict, and that was lost: "
    "give every parameter to one optimizer, and load weights before optimizer.train() or after optimizer.eval()"
)


class Engine(Store):
    """The moves between the states of an optimizer: mean in the weights, a sample in them, samples waiting for a step.

    ``_held`` says what the weights hold (None: the mean) and ``_samples`` what was drawn since the last step.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        self._version = 0  # of the weights when the sample was put there
        self._had_gradients = False
        super().__init__(params, defaults, backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._held is not None:  # a copy of an optimizer and of its parameters
            self._note_sample()

    def _note_sample(self) -> None:
        """The weights have just got a sample."""
        holders.hold(self)
        self._version = self._versions()

    _agreed = False  # the ranks have compared their seeds since this optimizer was built or unpickled

    def _agree(self) -> None:
        """Make sure that all replicas draw from one seed."""
        steps = 0
        if distributed.world()[1] > 1:
            steps = max((int(arena.steps.max()) for arena in {slot.arena for slot in self._ordered}), default=0)
        seed = distributed.agree_on_seed(self.seed, self._seed_given, steps)
        for settings in (self.defaults, *self.param_groups):
            settings["seed"] = seed
        self._agreed = True

    @property
    def _replicas(self) -> int:
        """How many ranks draw noise of their own."""
        return distributed.world()[1] if self.sync else 1

    def _train_draw(self) -> Draw:
        """The last sample of the coming step."""
        if self._samples.replay is not None:
            return Draw(self.seed, self._samples.replay, step=EVAL_STEP)
        return Draw(self.seed, self._samples.count - 1, distributed.world()[0] if self._replicas > 1 else 0)

    # ---- what the weights hold -----------------------------------------------------------------------------------

    def _put(self, draw: Draw) -> None:
        """Weights <- mean + sigma eps."""
        adopt = self._held is None
        if adopt:
            self._refresh()
            holders.refuse_others(self, self._active_params)
        self._check_capture()
        self._rows.update(self.param_groups)
        for backend, slots in self._active:
            backend.sample(slots, draw, adopt)
        self._held = draw
        self._announce(self._active_params, self._fsdp)
        self._note_sample()

    def _restore(self) -> None:
        """Weights <- mean, if they hold a sample."""
        if self._held is None:
            return
        self._catch_up()
        for backend, slots in self._active:
            backend.restore(slots)
        self._let_go()
        self._announce(self._active_params, self._fsdp)

    def _let_go(self) -> None:
        """The weights hold the mean again."""
        self._held = None
        holders.let_go(self)

    def _versions(self) -> int:
        """A number that changes with every write into the weights that autograd knows of.

        It looks at a few of them: who writes at all, another optimizer or load_state_dict, hardly ever leaves them out.
        """
        params = self._active_params
        return sum(map(_VERSION_OF, params[:: len(params) // _WATCHED + 1]))

    def _edited(self) -> bool:
        """Whether the weights were written by somebody else while they hold a sample."""
        return self._held is not None and self._version != self._versions()

    def _restore_unedited(self) -> None:
        """Weights <- mean, at the end of a sample.

        Raises:
            RuntimeError: After that, if somebody wrote into the weights in the meantime: it is lost.
        """
        edited = self._edited()
        self._restore()
        if edited:
            raise RuntimeError(EDITED)

    held_by = "another IVON optimizer: give every parameter to one optimizer, or call the other's eval() first"

    def holds_any(self, params: Iterable[Tensor]) -> bool:
        """Whether one of these parameters holds a sample of this optimizer."""
        return self._held is not None and not self._slots.keys().isdisjoint(params)

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
                self._activate([self._slots[slot.parameter] for slot in self._active_slots])
            self._stale = True

    # ---- the samples of a step -----------------------------------------------------------------------------------

    def _begin_sample(self, replay: int | None = None) -> None:
        """Draw the next MC sample of the coming step, after counting in the gradient of the one before.

        With `replay` it has the noise of that evaluation sample.
        """
        if self._samples.count == MAX_SAMPLES:
            raise RuntimeError(f"{MAX_SAMPLES} samples were drawn without a step(): call step() or discard_samples()")
        if not self._agreed:
            self._agree()
        self._follow_swaps()  # now that no sample is counted yet
        self._fold()
        self._samples.count += 1
        self._samples.replay = replay
        try:
            self._put(self._train_draw())
            self._require_trained()
        except BaseException:
            self._samples.count -= 1
            raise

    def _require_trained(self) -> None:
        """Refuse to train nothing."""
        if not self._active_slots and (self._ordered or self._stateless):
            self._restore()
            raise RuntimeError(
                f"none of the optimizer's {len(self._ordered) + len(self._stateless)} parameters requires a gradient: "
                "unfreeze those to be trained (requires_grad_(True)), or give the optimizer others"
            )

    @_disable_dynamo
    def discard_samples(self) -> None:
        """Forget the unfinished step and restore the mean; the next sample is the first one of this step again."""
        self._restore()
        self._forget_samples()

    def _abort_sample(self) -> None:
        """The block failed: its sample does not count, and the mean comes back."""
        self._restore()
        if self._samples.count == 0:  # the block took the step before it failed
            return
        self._samples.count -= 1
        if self._samples.count:  # its gradients must not leak into the next sample's
            for slot in self._active_slots:
                slot.parameter.grad = None

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
        in_use = {slot.arena for slot in self._ordered if slot.summed}
        for arena in {slot.arena for slot in self._active_slots} - in_use:
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
            slot.parameter.grad = None
        self._drop_gradients()
        samples.closed.clear()
        samples.folded = samples.count

    # ---- their gradients -----------------------------------------------------------------------------------------

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

    def _point_to_slots(self, slots: list[ParamState]) -> Launches:
        """Launches of some of the active slots, with the gradients that the slots hold."""
        launches = self._launches(slots)
        for _, part in launches:
            if part.pointers is not None:
                part.pointers.set_grads([slot.grad for slot in part.slots])
        return launches

    @staticmethod
    def _first_nonfinite(launches: Launches) -> str | None:
        found = [(part, backend.find_nonfinite(part)) for backend, part in launches]
        return next((part.slots[position].name for part, position in found if position is not None), None)

    @staticmethod
    def _check(launches: Launches) -> None:
        """Let the devices look for inf and nan; the final launch of the step acts on what they found."""
        for backend, part in launches:
            assert isinstance(backend, DeviceBackend)
            backend.check(part)
