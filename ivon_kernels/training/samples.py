"""The Monte-Carlo samples of the step that is under way: put into the weights, and their gradients collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ivon_kernels.backends import DeviceBackend, Draw, Launch
from ivon_kernels.backends.state import ParamState
from ivon_kernels.noise import EVAL_STEP, MAX_SAMPLES, in_pairs
from ivon_kernels.training import replicas
from ivon_kernels.training.gradients import (
    Closed,
    EarlierGradient,
    closed_gradients,
    computed_at_mean,
    refuse_zeroed,
    take_gradients,
)
from ivon_kernels.training.parameters import Parameters
from ivon_kernels.weights import EDITED, Selection, Weights

__all__ = ["Closure", "NonFinite", "Samples", "first_nonfinite"]

Closure = Callable[[], Any]
NonFinite = Literal["raise", "skip", "ignore"]


class Samples:
    """From the first sample of a step to the launches that take it.

    ========================  ===============  ==========================================================
    weights hold              no sample drawn  one or more drawn
    ========================  ===============  ==========================================================
    the mean                  idle             waiting: a block was closed, or ``eval()`` was called
    a sample                  (never)          sampling: after ``train()``, or inside a block
    ========================  ===============  ==========================================================

    `weights.held` is the row, `count` the column. An evaluation sample may lie over any of them, and what it found is
    put back after it. :meth:`begin` leads to sampling, :meth:`close` and :meth:`restore` to waiting, :meth:`discard`,
    :meth:`abort` of the only sample and :meth:`finish` to idle (or, where the step has drawn the next sample, to
    sampling with `unused`).

    A sample's gradient is read as late as possible, at the next sample (:meth:`fold`) or at the step (:meth:`gather`),
    so that clipping, unscaling and accumulation take effect.

    Args:
        parameters: Whose weights are sampled.
        weights: What these hold.
        nonfinite: As for :class:`ivon_kernels.IVON`.
        seed_given: Somebody chose the seed; it is not just torch's.
        antithetic: As for :class:`ivon_kernels.IVON`.

    Attributes:
        count: Samples drawn for the coming step.
        replay: The evaluation sample whose noise the last one has; None: fresh noise.
        unused: The only sample was drawn by the step before, and nobody has asked for it yet.
        folded: Samples whose gradients are in the sums.
        of_all_ranks: Samples in the sums once they are those of all ranks (``sync=True``), else 0.
        bad: A parameter whose gradient was not finite in a folded sample, or None.
    """

    def __init__(
        self, parameters: Parameters, weights: Weights, nonfinite: NonFinite, seed_given: bool, antithetic: bool
    ) -> None:
        # For good.
        self.parameters, self.weights = parameters, weights
        self.nonfinite = nonfinite
        self.seed_given = seed_given
        self.antithetic = antithetic
        # Once.
        self.had_gradients = False
        self._agreed = False  # the ranks have compared their seeds since this optimizer was built or unpickled
        # While a closure or a launch runs.
        self.in_closure = False
        self._grads_in_states = False
        self._earlier: dict[Tensor, tuple[Tensor, int]] = {}  # gradients of what is not sampled, from before the sample
        # From step to step.
        self._start_over()

    def _start_over(self) -> None:
        self.count = 0
        self.replay: int | None = None
        self.unused = False
        self.folded = 0
        self.of_all_ranks = 0
        self.bad: str | None = None
        self._closed: Closed = {}
        self._left: Closed | None = None  # the gradients when the mean came back, with the sample's step to be taken

    def resume(
        self, count: int, replay: int | None, folded: int, bad: str | None, *, in_closure: bool, had_gradients: bool
    ) -> None:
        """Go on with the samples of an optimizer that was copied in the middle of a step."""
        self.count, self.replay, self.folded, self.bad = count, replay, folded, bad
        self.in_closure, self.had_gradients = in_closure, had_gradients

    def choose(self, nonfinite: NonFinite) -> None:
        """Treat gradients with inf or nan in this way from now on."""
        self.nonfinite = nonfinite

    def note_seed(self, given: bool) -> None:
        """Note whether somebody chose the seed that the groups have now."""
        self.seed_given = given

    # ---- which sample --------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> int:
        """How many ranks draw noise of their own."""
        return replicas.world()[1] if self.parameters.sync else 1

    @property
    def draw(self) -> Draw:
        """The last sample of the coming step."""
        seed = self.parameters.seed
        if self.replay is not None:
            return Draw(seed, self.replay, step=EVAL_STEP)
        number = in_pairs(self.count - 1) if self.antithetic else self.count - 1
        return Draw(seed, number, replicas.world()[0] if self.parameters.sync else 0)

    def _agree(self) -> None:
        """Make sure that all replicas draw from one seed."""
        steps = 0
        if replicas.world()[1] > 1:
            arenas = {state.arena for state in self.parameters.ordered}
            steps = max((int(arena.steps.max()) for arena in arenas), default=0)
        self.parameters.reseed(replicas.agree_on_seed(self.parameters.seed, self.seed_given, steps))
        self._agreed = True

    # ---- into the weights and out of them ------------------------------------------------------------------------

    def put(self, draw: Draw) -> None:
        """Weights <- mean + sigma eps, whatever they hold."""
        if self.weights.held is None:
            self.follow()
            self._refresh()
        else:
            self._catch_up()
        self._put(draw)

    def take_in(self) -> None:
        """Let the sample that is in the weights be of what was unfrozen or added since, too."""
        self.follow()
        self._refuse_unsampled()  # it would pass for the sample's from now on
        self._catch_up()
        before = self.parameters.active
        self._refresh()
        if self.parameters.active is not before and not self.weights.edited:
            self.parameters.check_capture()
            self.parameters.scalars.update(self.parameters.groups)
            self.weights.extend(self.parameters.active, self.draw)

    def _put(self, draw: Draw) -> None:
        """The same where the parameters have just been looked at."""
        self.parameters.check_capture()
        self.parameters.scalars.update(self.parameters.groups)
        self.weights.put(self.parameters.active, draw)

    def restore(self) -> None:
        """Weights <- mean, if they hold a sample."""
        if self.weights.held is not None:
            self.weights.restore(self._catch_up())

    def restore_unedited(self) -> None:
        """Weights <- mean, at the end of a sample.

        Raises:
            RuntimeError: After that, if somebody wrote into the weights in the meantime: it is lost.
        """
        edited = self.weights.edited
        self.restore()
        if edited:
            raise RuntimeError(EDITED)

    def _refresh(self) -> None:
        if self.parameters.refresh(keep=not self.is_idle):
            self._tell_devices()

    def follow(self) -> None:
        """Follow what was done to ``param_groups`` and ``state`` since the last look."""
        parameters, weights = self.parameters, self.weights
        if gone := parameters.follow_groups(idle=self.is_idle):
            lost = set(gone).intersection(parameters.active.states)
            parameters.activate([state for state in parameters.active.states if state not in lost])
            if weights.held is not None:
                weights.follow(parameters.active)
                weights.write(parameters.active.select(list(lost)), None)
        if rewritten := parameters.follow_state(idle=self.is_idle):
            weights.write(parameters.active.select(rewritten), None)

    def _catch_up(self) -> Selection:
        before = self.parameters.active
        if self.parameters.catch_up():
            self._tell_devices()
        if self.parameters.active is not before:
            self.weights.follow(self.parameters.active)
        return self.parameters.active

    def adopt_edits(self) -> None:
        """Take weights that were edited while they hold the mean over as the new mean."""
        self.follow()
        if self.weights.held is None:
            self.weights.refuse_others([state.parameter for state in self.parameters.ordered])
            if self.parameters.adopt_edits():
                self._tell_devices()

    @property
    def is_idle(self) -> bool:
        """Whether no step is under way and the weights hold the mean."""
        return self.weights.held is None and not self.count

    def findings(self) -> list[int]:
        """Which parameters had a bad gradient in the finished samples of this step. Waits for the devices."""
        if not self.folded:
            return []
        named = [state.index for state in self.parameters.ordered if state.name == self.bad]
        return named + [flags.found() for flags in self.parameters.flags.values()]

    def _tell_devices(self) -> None:
        """Tell the devices that parameters have moved to what was found where they were."""
        if found := self.findings():
            for flags in self.parameters.flags.values():
                flags.forget(*found)

    # ---- samples begin and end -----------------------------------------------------------------------------------

    def begin(self, replay: int | None = None) -> None:
        """Draw the next sample of the coming step, after counting in the gradient of the one before.

        Args:
            replay: Take the noise of this evaluation sample.

        Raises:
            RuntimeError: If too many were drawn, or nothing is trained.
        """
        if self.count == MAX_SAMPLES:
            raise RuntimeError(f"{MAX_SAMPLES} samples were drawn without a step(): call step() or discard_samples()")
        if not self._agreed:
            self._agree()
        self.follow()
        fresh = self.is_idle
        if fresh:
            self._refresh()  # before this sample is counted
            self._earlier = self.parameters.other_gradients()
        else:
            self._refuse_unsampled()
        self.fold()  # of the parameters that had the last sample, before others are chosen
        self.count += 1
        self.replay = replay
        try:
            if not fresh:
                self._catch_up()
                self._refresh()
            self._put(self.draw)
            self._require_trained()
        except BaseException:
            self.count -= 1
            raise

    def ask(self) -> None:
        """Somebody asks for the sample: it is not just what the step before has left."""
        self.unused = False

    def close(self, drawn: int) -> None:
        """The block of sample number `drawn` has ended: its gradients wait for the step, and the mean comes back.

        Raises:
            RuntimeError: After that, if somebody wrote into the weights in the meantime.
        """
        edited = self.weights.edited
        self.restore()
        if self.count == drawn:  # else the block took the step itself
            self._left = self._closed = closed_gradients(self.parameters.active.states)
        if edited:
            raise RuntimeError(EDITED)

    def pause(self) -> None:
        """The mean comes back before the step, and gradients that are computed meanwhile are none of the sample.

        Raises:
            RuntimeError: After that, if somebody wrote into the weights in the meantime.
        """
        waits = self.weights.held is not None and self.count > 0
        self.restore_unedited()
        if waits:
            self._left = closed_gradients(self.parameters.active.states)

    def go_on(self) -> None:
        """Put the sample of before :meth:`pause` back.

        Raises:
            RuntimeError: If there is a gradient that was computed at the mean.
        """
        self._refuse_at_mean(changed=True)
        self._refuse_unsampled()
        self._left = None
        self.put(self.draw)

    def _refuse_at_mean(self, *, changed: bool = False) -> None:
        """Refuse gradients that came while the weights held the mean; with `changed` also what was added to others."""
        name = computed_at_mean(self._left, self.parameters.active.states, changed=changed)
        if name is not None:
            self.discard()
            raise RuntimeError(
                f"the gradient of {name} was computed while the weights held the mean, not the sample: call backward() "
                "before the sampled_params() block ends, or before optimizer.eval() (activation checkpointing hides "
                "this from autograd); the samples of this step were discarded"
            )

    def abort(self) -> None:
        """The block failed: its sample does not count, and the mean comes back."""
        self.restore()
        if self.count == 0:  # the block took the step before it failed
            return
        self.count -= 1
        if self.count:  # its gradients must not leak into the next sample's
            self._clear_gradients(self.parameters.active.states)

    def discard(self) -> None:
        """Forget the unfinished step and restore the mean; the next sample is the first one of this step again."""
        self.restore()
        self.forget()

    def forget(self, *, findings: bool = True) -> None:
        """No sample was drawn; with `findings` the devices also forget what they found in earlier samples."""
        if self.folded:
            for state in self.parameters.active.states:
                state.mark_summed(False)
            if findings:
                for flags in self.parameters.flags.values():
                    flags.forget()
        self._start_over()
        self._drop_gradients()

    def finish(self, *, next_drawn: bool) -> None:
        """The step was taken; with `next_drawn` it has left the next sample in the weights."""
        self.forget(findings=False)  # the final launch did that
        if next_drawn:
            self.count, self.unused = 1, True
        self.weights.settle(self.parameters.active, self.draw if next_drawn else None)

    def _require_trained(self) -> None:
        """Refuse to train nothing."""
        if not self.parameters.active.states and not self.parameters.is_empty:
            self.restore()
            raise RuntimeError(
                f"none of the optimizer's {self.parameters.count} parameters requires a gradient: "
                "unfreeze those to be trained (requires_grad_(True)), or give the optimizer others"
            )

    def run(self, closure: Closure, number: int) -> Any:
        """Call a closure under each of `number` samples, the one that is in the weights first.

        Returns:
            Its loss, averaged.

        Raises:
            RuntimeError: If a sample would get gradients that were computed before it.
        """
        losses: list[Any] = []
        self.in_closure = True
        try:
            for sample in range(number):
                drawn = bool(sample) or self.weights.held is None
                if drawn:
                    self.begin()
                params = self.parameters.active.params
                earlier = EarlierGradient(params) if drawn else None
                with torch.enable_grad():
                    loss = closure()
                if drawn and self.count > 1 and all(p.grad is None for p in params):
                    self.abort()
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
            self.discard()
            raise
        finally:
            self.in_closure = False
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    # ---- their gradients -----------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Add the gradients of the last sample to the sums, once."""
        if self.folded == self.count:
            return
        self._refuse_at_mean()
        refuse_zeroed(self._closed)
        parameters = self.parameters
        # A parameter may join at a later sample, in an arena whose sums others use already: those must not be cleared.
        in_use = {state.arena for state in parameters.ordered if state.summed}
        for arena in {state.arena for state in parameters.active.states} - in_use:
            arena.clear_sums()
        parameters.scalars.update(parameters.groups)
        launches = self._with_gradients(only_last=True)
        states = [state for launch in launches for state in launch.states]
        for state in states:
            state.mark_summed(True)
        if self.nonfinite != "ignore":
            if parameters.on_device:
                check(launches)
            else:
                self.bad = self.bad or first_nonfinite(launches)
        for launch in launches:
            launch.mark_summed(True)
            launch.backend.accumulate(launch, self.draw)
        self._clear_gradients(states)  # or backward would add the next sample's gradient to this one's
        self._drop_gradients()
        self._closed, self._left = {}, None
        self.folded = self.count

    def gather(self) -> list[Launch]:
        """The launches of the step: the parameters with a gradient of any sample."""
        self.follow()
        self._refuse_at_mean()
        self._refuse_unsampled()
        active = self._catch_up()
        if self.folded < self.count:
            launches = self._with_gradients()
        else:
            launches = self._point_to_states([state for state in active.states if state.summed])
        summed = self.folded > 0
        for launch in launches:
            if launch.summed != summed:
                launch.mark_summed(summed)
        self.had_gradients |= bool(launches)
        return launches

    def _refuse_unsampled(self) -> None:
        """Refuse to drop the gradient of a parameter that had no sample, unless it is older than the sample."""
        for param, (grad, version) in self.parameters.other_gradients().items():
            old, old_version = self._earlier.get(param, (None, 0))
            if grad is not old or version != old_version:
                name = self.parameters.names()[param]
                raise RuntimeError(
                    f"{name} has a gradient, but was frozen or not yet in the optimizer when this step's sample was "
                    "drawn: call optimizer.train() again after unfreezing it (after switching the adapter, say) and "
                    "before the forward pass, or clear that gradient"
                )

    def share(self, bad: bool) -> bool:
        """Add up the samples of all ranks (``sync=True``). All of this rank's are in the sums.

        Args:
            bad: Whether this rank must not take the step.

        Returns:
            Whether some rank must not.

        Raises:
            RuntimeError: If the gradients were averaged over the ranks before.
        """
        shared = replicas.share_samples(self.parameters.active.states, self.count, bad or self.bad is not None)
        if shared.averaged:
            self.discard()
            raise RuntimeError(replicas.AVERAGED)
        self.of_all_ranks = shared.samples
        if shared.bad:
            self.bad = self.bad or "a parameter on another rank"
        return shared.bad

    def _with_gradients(self, *, only_last: bool = False) -> list[Launch]:
        """Read the gradients of the last sample. Returns launches of what has one, or sums of earlier samples."""
        active = self.parameters.active
        # All of them, whatever the first says: each reads its own.
        irregular = [launch.addresses is None or launch.addresses.read_grads() != 0 for launch in active.launches]
        if not any(irregular):
            return active.launches
        take_gradients(active.states, self._closed)
        self._grads_in_states = True
        return self._point_to_states(
            [state for state in active.states if state.grad is not None or (state.summed and not only_last)]
        )

    def _point_to_states(self, states: list[ParamState]) -> list[Launch]:
        """Launches of some of the active parameters, with the gradients that their states hold."""
        launches = self.parameters.active.part(states)
        for launch in launches:
            if launch.addresses is not None:
                launch.addresses.set_grads([state.grad for state in launch.states])
        return launches

    def _clear_gradients(self, states: list[ParamState]) -> None:
        for state in states:
            state.parameter.grad = None

    def _drop_gradients(self) -> None:
        """Do not keep gradients alive after their launch."""
        if self._grads_in_states:
            for state in self.parameters.active.states:
                state.take_grad(None)
            self._grads_in_states = False


def first_nonfinite(launches: list[Launch]) -> str | None:
    """The name of a parameter whose gradient holds inf or nan."""
    for launch in launches:
        position = launch.backend.find_nonfinite(launch)
        if position is not None:
            return launch.states[position].name
    return None


def check(launches: list[Launch]) -> None:
    """Let the devices look for inf and nan; the final launch of the step acts on what they found."""
    for launch in launches:
        assert isinstance(launch.backend, DeviceBackend)
        launch.backend.check(launch)
