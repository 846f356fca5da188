"""What others see of the optimizer's state: state dicts, copies, the mean, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ivon_kernels import checkpoint, sharding
from ivon_kernels.backends.state import ParamState, by_backend
from ivon_kernels.gradients import Samples
from ivon_kernels.hyperparameters import GroupScalars
from ivon_kernels.parameters import Parameters
from ivon_kernels.training import diagnostics
from ivon_kernels.training.snapshot import snapshot

if TYPE_CHECKING:
    from ivon_kernels.posterior import Posterior


class Store(Parameters):
    """Reading the state, saving it, and putting it back. Public methods are documented for :class:`IVON`."""

    @property
    def skipped_steps(self) -> int:
        """Steps not taken, because of a GradScaler or with ``nonfinite="skip"``. Waits for devices that count them."""
        return self._skipped + sum(control.skipped() for control in self._controls.values())

    @property
    def holds_sample(self) -> bool:
        """Whether the weights hold a sample now, and not the mean."""
        return self._held is not None

    def mean_of(self, param: Tensor) -> Tensor:
        """The mean of a parameter, in its dtype and placement, also while the weights hold a sample.

        Returns:
            The parameter itself (detached) where it holds the mean, else a copy: the same one until the weights change.

        Raises:
            ValueError: If the optimizer does not have the parameter.
        """
        slot = self._slots.get(param)
        if slot is None and not any(param is place[0] for place in self._stateless):
            raise ValueError(f"the optimizer has no such parameter of shape {tuple(param.shape)}")
        if slot is None or self._held is None or slot not in self._active_slots:
            return param.detach()
        if slot not in self._mean_copies:
            self._mean_copies[slot] = slot.outside(torch.empty_like(slot.param, requires_grad=False).copy_(slot.mean))
        return self._mean_copies[slot]

    def posterior(self, model: nn.Module, adapter: str | None = None) -> Posterior:
        """The trained posterior by the names that the weights are saved by: to save, sample, predict, prune, temper.

        A copy: further training does not change it. It is about every parameter that was trained, also while a sample
        is in the weights. Of sharded parameters it holds all elements, so all ranks have to call this.

        Args:
            model: The model that is trained, perhaps wrapped by DistributedDataParallel or torch.compile.
            adapter: Which of its PEFT adapters; None for the active one.

        Raises:
            ValueError: If a trained parameter is not in the model.
        """
        from ivon_kernels.posterior import Posterior

        self._adopt_edits()
        return Posterior.of_snapshot(snapshot(self.param_groups, self.state, self.seed), model, adapter)

    def diagnostics(self) -> list[dict[str, Any]]:
        """Whether training changes anything, one dict per parameter group.

        Returns:
            For each group ``elements``, ``steps``, and, as ``{quantile: value}`` over its elements, ``sigma``
            (posterior standard deviation), ``snr`` (``|mean| / sigma``) and ``hess_over_init`` (1: the Hessian has not
            moved); ``clipped`` is the share of elements whose last direction the clip radius binds.
        """
        self._adopt_edits()
        groups: list[list[ParamState]] = [[] for _ in self.param_groups]
        for slot in self._ordered:
            groups[slot.group].append(slot)
        return [diagnostics.summarize(group, slots) for group, slots in zip(self.param_groups, groups, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """As in every torch optimizer. `mean` is the mean also while a sample is in the weights.

        A step that is under way (samples drawn, :meth:`step` not yet called) is not part of it.
        """
        self._adopt_edits()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the state dict was taken: state, counters, seed and hyperparameters; never cast down.

        The weights are set to the saved mean. State dicts of ivon-opt 0.1.3 are taken too (load the weights first).

        Raises:
            ValueError: If it does not fit; nothing is changed then.
        """
        self._follow_swaps()
        loaded: dict[str, Any] = {}

        def capture(_: Optimizer, candidate: dict[str, Any]) -> dict[str, Any]:
            if checkpoint.is_ivon_opt(candidate):
                candidate = checkpoint.from_ivon_opt(candidate, self.param_groups)
            checkpoint.check(candidate, self.param_groups, self._all_names())
            loaded.update(candidate)
            return candidate

        # torch casts float state to the parameter's dtype; `capture`, the last hook to run, keeps the original for
        # __setstate__, which torch calls before the post hooks.
        hook = self.register_load_state_dict_pre_hook(capture)
        self._loading = loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key in self._plain_attributes()}
        own["_skipped"] = self.skipped_steps
        sums = {slot.index: slot.sums for slot in self._slots.values() if slot.sums is not None}
        samples = (self._samples.count, self._samples.replay, self._samples.folded, self._samples.nonfinite)
        active = [slot.index for slot in self._active_slots]
        return {**super().__getstate__(), "_own": (own, samples, sums, active, self._findings())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        restored = state.pop("_own", None)
        super().__setstate__(state)
        if restored is None:
            self._finish_loading()
            return
        own, (count, replay, folded, nonfinite), sums, active, found = restored
        self.__dict__.update(own)
        self._slots, self._ordered, self._loading, self._mean_copies, self._lists = {}, [], None, {}, []
        self._rows, self._controls, self._lr, self._grads_in_slots, self._frozen = GroupScalars(), {}, {}, False, []
        self._hold_lr()
        self._samples = Samples(count, replay, folded=folded, nonfinite=nonfinite)
        self._set_state(dict(self.state))
        slots = {slot.index: slot for slot in self._slots.values()}
        self._activate([slots[index] for index in active])
        self._carry_over(sums, found)

    @torch.no_grad()
    def _finish_loading(self) -> None:
        """Take over the state dict as it was before torch cast it, and put its mean into the weights."""
        assert self._loading is not None
        saved = checkpoint.by_parameter(self._loading, self.param_groups)
        self._samples, self._held = Samples(), None
        self._seed_given |= self.seed != self.defaults["seed"]
        for group in self.param_groups:
            if not self.defaults["capturable"] and group.get("capturable"):
                group["lr"] = float(group["lr"])
            group["capturable"] = self.defaults["capturable"]  # how the optimizer runs, not what it has learned
        self._hold_lr()
        self._set_state(saved)
        self._rows.update(self.param_groups)
        for backend, slots in by_backend([self._slots[param] for param in saved], self._rows):
            backend.restore(slots)
        self._announce(list(saved), sharding.fsdp_modules(saved))

    @staticmethod
    def _plain_attributes() -> tuple[str, ...]:
        return (
            "nonfinite",
            "sample_in_step",
            "_mode",
            "_in_closure",
            "_eval_samples",
            "_seed_given",
            "_backend_name",
            "_held",
            "_evaluating",
            "_had_gradients",
        )

    def _set_state(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """The state of all parameters: from `saved` where it has some, initial for other trainable ones."""
        self._activate([])
        self.state.clear()
        for slot in self._ordered:
            slot.summed = False
            slot.set_state(saved.get(slot.parameter), float(self.param_groups[slot.group]["hess_init"]))
            self.state[slot.parameter] = slot.state()
        new = [p for p in self._places() if self._needs_state(p[0]) or (p[0] in saved and p[0] not in self._slots)]
        self._place(new, saved)
