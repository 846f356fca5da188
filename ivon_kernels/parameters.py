"""What lies under the optimizer's front end: parameters and their state, the sample in the weights, launches."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, ParamsT

from ivon_kernels import checkpoint, diagnostics, hyperparameters
from ivon_kernels.arena import Arena, Slot, by_backend, state_dtype
from ivon_kernels.backends import Draw, choose
from ivon_kernels.gradients import Samples, check_parameter

_Place = tuple[Tensor, int, int]  # parameter, its group, its index among all parameters


class ParameterStore(Optimizer):
    """Everything of the optimizer that users do not call: see :class:`ivon_kernels.IVON`."""

    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        self._backend_name = backend
        self._slots: dict[Tensor, Slot] = {}
        self._ordered: list[Slot] = []  # all slots, in the parameters' order
        self._stateless: list[_Place] = []  # frozen parameters
        self._activate([])
        self._samples = Samples()
        self._held: Draw | None = None  # the sample in the weights; None: the mean
        self._loading: dict[str, Any] | None = None  # the state dict that load_state_dict is taking over
        super().__init__(params, defaults)

    # ---- public, documented on IVON ----------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """Seed of the noise; it travels in the parameter groups of a state dict."""
        seed: int = self.param_groups[0]["seed"]
        return seed

    @property
    def backends(self) -> dict[str, str]:
        """The backend that runs each kind of parameter, e.g. ``{"cpu/float32": "cpu"}``."""
        return {
            f"{slot.param.device}/{str(slot.param.dtype).removeprefix('torch.')}": slot.backend.name
            for slot in self._slots.values()
        }

    def diagnostics(self) -> list[dict[str, Any]]:
        """Whether training changes anything, one dict per parameter group.

        Returns:
            For each group ``elements``, ``steps``, and, as ``{quantile: value}`` over its elements, ``sigma``
            (posterior standard deviation), ``snr`` (``|mean| / sigma``) and ``hess_over_init`` (1: the Hessian has not
            moved); ``clipped`` is the share of elements whose last direction the clip radius binds.
        """
        self._adopt_edits()
        groups: list[list[Slot]] = [[] for _ in self.param_groups]
        for slot in self._ordered:
            groups[slot.group].append(slot)
        return [diagnostics.summarize(group, slots) for group, slots in zip(self.param_groups, groups, strict=True)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every torch optimizer.

        Raises:
            ValueError, TypeError: If a parameter or hyperparameter cannot be used; the group is not added then.
        """
        for key in hyperparameters.OPTIMIZER_KEYS:
            if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"{key} belongs to the whole optimizer; a parameter group cannot override it")
        for key in set(param_group) - set(self.defaults):
            if close := difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.75):
                raise ValueError(f"a parameter group has {key!r}, which IVON does not know: did you mean {close[0]!r}?")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        number = len(self.param_groups) - 1
        try:
            hyperparameters.validate(group, f"parameter group {number}")
            for param, name in zip(group["params"], self._names(group, number), strict=True):
                check_parameter(param, name)
                choose(self._backend_name, param.device, param.dtype)
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            raise
        self._place([place for place in self._places() if self._needs_state(place[0])], {})

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
        sums = {slot.index: slot.sums for slot in self._slots.values() if slot.sums is not None}
        samples = (self._samples.count, self._samples.folded, self._samples.nonfinite)
        active = [slot.index for slot in self._active_slots]
        return {**super().__getstate__(), "_own": (own, samples, sums, active)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        restored = state.pop("_own", None)
        super().__setstate__(state)
        if restored is None:
            self._finish_loading()
            return
        own, (count, folded, nonfinite), sums, active = restored
        self.__dict__.update(own)
        self._slots, self._ordered, self._loading = {}, [], None
        self._samples = Samples(count, folded, nonfinite)
        self._set_state(dict(self.state))
        slots = {slot.index: slot for slot in self._slots.values()}
        self._activate([slots[index] for index in active])
        if sums:
            for arena in {slot.arena for slot in slots.values()}:
                arena.clear_sums()
            for index, pair in sums.items():
                slots[index].summed = True
                for own_sum, saved_sum in zip(slots[index].sums or (), pair, strict=True):
                    own_sum.copy_(saved_sum)

    @torch.no_grad()
    def _finish_loading(self) -> None:
        """Take over the state dict as it was before torch cast it, and put its mean into the weights."""
        assert self._loading is not None
        saved = checkpoint.by_parameter(self._loading, self.param_groups)
        self._samples, self._held = Samples(), None
        self._set_state(saved)
        for backend, slots in by_backend([self._slots[param] for param in saved]):
            backend.restore(slots)
        increment_version(list(saved))

    @staticmethod
    def _plain_attributes() -> tuple[str, ...]:
        return (
            "nonfinite",
            "sample_in_step",
            "skipped_steps",
            "_mode",
            "_in_closure",
            "_eval_samples",
            "_backend_name",
            "_held",
        )

    # ---- parameters and state ----------------------------------------------------------------------------------------

    @staticmethod
    def _names(group: dict[str, Any], number: int) -> list[str]:
        if "param_names" in group:
            return list(group["param_names"])
        return [
            f"param_groups[{number}]['params'][{i}] of shape {tuple(p.shape)}" for i, p in enumerate(group["params"])
        ]

    def _all_names(self) -> dict[Tensor, str]:
        return {
            param: name
            for number, group in enumerate(self.param_groups)
            for param, name in zip(group["params"], self._names(group, number), strict=True)
        }

    def _places(self) -> list[_Place]:
        params = [(param, number) for number, group in enumerate(self.param_groups) for param in group["params"]]
        return [(param, number, index) for index, (param, number) in enumerate(params)]

    def _needs_state(self, param: Tensor) -> bool:
        return param.requires_grad and param not in self._slots

    def _place(self, places: Iterable[_Place], saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Give parameters state in new arenas: a copy of what `saved` has, else the initial state."""
        names = self._all_names()
        buckets: dict[tuple[torch.device, torch.dtype], list[_Place]] = {}
        for place in places:
            buckets.setdefault((place[0].device, state_dtype(place[0].dtype)), []).append(place)
        with torch.inference_mode(False), torch.no_grad():
            for (device, dtype), bucket in buckets.items():
                backends = [choose(self._backend_name, param.device, param.dtype) for param, _, _ in bucket]
                keep_noise = any(backend.keeps_noise for backend in backends)
                arena = Arena([param.numel() for param, _, _ in bucket], device, dtype, keep_noise)
                for position, ((param, number, index), backend) in enumerate(zip(bucket, backends, strict=True)):
                    slot = Slot(param, names[param], index, number, backend, arena, position)
                    slot.set_state(saved.get(param), float(self.param_groups[number]["hess_init"]))
                    self._slots[param] = slot
                    self.state[param] = slot.state()
        self._ordered = sorted(self._slots.values(), key=lambda slot: slot.index)
        self._stateless = [place for place in self._places() if place[0] not in self._slots]

    def _set_state(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """The state of all parameters: from `saved` where it has some, initial for other trainable ones."""
        self._activate([])
        self.state.clear()
        for slot in self._ordered:
            slot.summed = False
            slot.set_state(saved.get(slot.param), float(self.param_groups[slot.group]["hess_init"]))
            self.state[slot.param] = slot.state()
        new = [p for p in self._places() if self._needs_state(p[0]) or (p[0] in saved and p[0] not in self._slots)]
        self._place(new, saved)

    def _activate(self, slots: list[Slot]) -> None:
        """Make these the slots whose weights are sampled."""
        self._active_slots = slots
        self._active = by_backend(slots)
        self._active_params = [slot.param for slot in slots]
        positions = Counter(slot.arena for slot in slots)
        self._active_arenas = [arena for arena, count in positions.items() if count == len(arena.steps)]

    def _follow_moves(self, slots: list[Slot], *, restrided: bool = True) -> bool:
        """Keep up with parameters whose memory, strides, device or dtype changed. Returns whether there were any.

        Without `restrided` a change of strides in the same memory is not looked for: it would have to happen to
        ``p.data`` between a sample and its step.
        """
        params = [slot.param for slot in slots]
        addresses = list(map(Tensor.data_ptr, params))  # map() keeps the loops in C: this runs twice a step
        strides = list(map(Tensor.stride, params)) if restrided else []
        if addresses == [slot.address for slot in slots] and (
            not restrided or strides == [slot.strides for slot in slots]
        ):
            return False
        moved = [slot for slot in slots if (slot.param.data_ptr(), slot.param.stride()) != (slot.address, slot.strides)]
        for slot in moved:
            if slot.param.shape != slot.mean.shape:
                raise RuntimeError(
                    f"{slot.name} had shape {tuple(slot.mean.shape)} when the optimizer was built and has "
                    f"{tuple(slot.param.shape)} now; build a new optimizer"
                )
            check_parameter(slot.param, slot.name)
            slot.remember_storage()
        elsewhere = [
            slot
            for slot in moved
            if (slot.param.device, state_dtype(slot.param.dtype)) != (slot.mean.device, slot.mean.dtype)
            or slot.backend.unsupported(slot.param.device, slot.param.dtype) is not None
        ]
        if elsewhere:
            saved = {slot.param: slot.state() for slot in elsewhere}
            self._place([(slot.param, slot.group, slot.index) for slot in elsewhere], saved)
        return bool(moved)

    def _refresh(self) -> None:
        """Decide whose weights to sample: every trainable parameter, wherever it now lives."""
        thawed = [place for place in self._stateless if place[0].requires_grad]
        if thawed:
            self._place(thawed, {})
        slots = [slot for slot in self._ordered if slot.param.requires_grad]
        if self._follow_moves(slots):
            self._activate([slot for slot in self._ordered if slot.param.requires_grad])
        elif slots != self._active_slots:
            self._activate(slots)

    def _adopt_edits(self) -> None:
        if self._held is None:
            with torch.no_grad():
                self._follow_moves(self._ordered)
                for slot in self._ordered:
                    slot.adopt_edits()
