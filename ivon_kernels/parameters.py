"""What lies under the optimizer's front end: parameters and their state, the sample in the weights, launches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, ParamsT

from ivon_kernels import checkpoint, diagnostics, hyperparameters
from ivon_kernels.arena import Arena, Slot, SlotList, by_backend, state_dtype
from ivon_kernels.backends import Backend, Control, Draw, choose
from ivon_kernels.gradients import Samples, check_parameter
from ivon_kernels.hyperparameters import Rows

_MAX_SUBSETS = 64  # of the active slots, which models that leave parameters unused have
_Place = tuple[Tensor, int, int]  # parameter, its group, its index among all parameters


class ParameterStore(Optimizer):
    """Everything of the optimizer that users do not call: see :class:`ivon_kernels.IVON`."""

    _step_supports_amp_scaling = True
    nonfinite: Literal["raise", "skip", "ignore"]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        self._backend_name = backend
        self._slots: dict[Tensor, Slot] = {}
        self._ordered: list[Slot] = []  # all slots, in the parameters' order
        self._stateless: list[_Place] = []  # frozen parameters
        self._rows = Rows()
        self._controls: dict[torch.device, Control] = {}
        self._lr: dict[int, Tensor] = {}  # learning rate of each group, with capturable
        self._stale = False  # the active slots have to be chosen again
        self._grads_in_slots = False
        self._frozen: list[Slot] = []  # slots of parameters that were trained and are frozen now
        self._activate([])
        self._samples = Samples()
        self._held: Draw | None = None  # the sample in the weights; None: the mean
        self._skipped = 0  # steps that the host skipped
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

    @property
    def sync(self) -> bool:
        """Whether every rank draws noise of its own."""
        return bool(self.param_groups) and bool(self.param_groups[0]["sync"])

    @property
    def skipped_steps(self) -> int:
        """Steps not taken, because of a GradScaler or with ``nonfinite="skip"``. Waits for devices that count them."""
        return self._skipped + sum(control.skipped() for control in self._controls.values())

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
            self._hold_lr()
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
        own["_skipped"] = self.skipped_steps
        sums = {slot.index: slot.sums for slot in self._slots.values() if slot.sums is not None}
        samples = (self._samples.count, self._samples.folded, self._samples.nonfinite)
        active = [slot.index for slot in self._active_slots]
        return {**super().__getstate__(), "_own": (own, samples, sums, active, self._findings())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        restored = state.pop("_own", None)
        super().__setstate__(state)
        if restored is None:
            self._finish_loading()
            return
        own, (count, folded, nonfinite), sums, active, found = restored
        self.__dict__.update(own)
        self._slots, self._ordered, self._loading = {}, [], None
        self._rows, self._controls, self._lr, self._grads_in_slots, self._frozen = Rows(), {}, {}, False, []
        self._hold_lr()
        self._samples = Samples(count, folded=folded, nonfinite=nonfinite)
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
        for group in self.param_groups:
            if not self.defaults["capturable"] and group.get("capturable"):
                group["lr"] = float(group["lr"])
            group["capturable"] = self.defaults["capturable"]  # how the optimizer runs, not what it has learned
        self._hold_lr()
        self._set_state(saved)
        self._rows.update(self.param_groups)
        for backend, slots in by_backend([self._slots[param] for param in saved], self._rows):
            backend.restore(slots)
        increment_version(list(saved))

    @staticmethod
    def _plain_attributes() -> tuple[str, ...]:
        return (
            "nonfinite",
            "sample_in_step",
            "_mode",
            "_in_closure",
            "_eval_samples",
            "_backend_name",
            "_held",
        )

    def _hold_lr(self) -> None:
        """Keep each group's learning rate in the float64 tensor that captured graphs read (``capturable=True``).

        Schedulers of torch fill such a tensor in place; one that assigns a number is followed at the next sample.
        """
        if not self.defaults["capturable"]:
            return
        for number, group in enumerate(self.param_groups):
            held = self._lr.get(number)
            devices = {param.device for param in group["params"]}
            if len(devices) > 1:
                raise ValueError(f"capturable=True needs parameter group {number} on one device, it is on {devices}")
            device = devices.pop() if devices else torch.device("cpu")
            if group["lr"] is held and held.device == device:
                continue
            value = float(group["lr"])
            if held is None or held.device != device:
                held = torch.tensor(value, dtype=torch.float64, device=device)
            else:
                held.fill_(value)
            self._lr[number] = group["lr"] = held

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
                if any(backend.on_device for backend in backends):
                    if device not in self._controls:
                        self._controls[device] = Control(device)
                    arena.control = self._controls[device]
                for position, ((param, number, index), backend) in enumerate(zip(bucket, backends, strict=True)):
                    slot = Slot(param, names[param], index, number, backend, arena, position)
                    slot.set_state(saved.get(param), float(self.param_groups[number]["hess_init"]))
                    self._slots[param] = slot
                    self.state[param] = slot.state()
        self._ordered = sorted(self._slots.values(), key=lambda slot: slot.index)
        self._stateless = [place for place in self._places() if place[0] not in self._slots]
        self._stale = True

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
        self._active = by_backend(slots, self._rows)
        self._active_params = [slot.param for slot in slots]
        # With sync=True the ranks have to agree on whether to step, so the host decides.
        self._on_device = bool(slots) and all(backend.on_device for backend, _ in self._active) and not self.sync
        self._on_cuda = self._on_device and slots[0].param.is_cuda
        self._subsets: dict[tuple[int, ...], list[tuple[Backend, SlotList]]] = {}

    def _launches(self, slots: list[Slot]) -> list[tuple[Backend, SlotList]]:
        """The launches of some of the active slots; lists that were needed before are found again."""
        if len(slots) == len(self._active_slots):
            return self._active
        key = tuple(slot.index for slot in slots)
        if key not in self._subsets:
            if len(self._subsets) == _MAX_SUBSETS:
                self._subsets.clear()
            self._subsets[key] = by_backend(slots, self._rows)
        return self._subsets[key]

    def _follow_moves(self, slots: list[Slot]) -> bool:
        """Keep up with parameters whose memory, strides, device or dtype changed. Returns whether there were any."""
        moved = [slot for slot in slots if slot.moved()]
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
            sums = {slot.index: slot.sums for slot in elsewhere if slot.sums is not None}
            found = self._findings()
            self._place([(slot.param, slot.group, slot.index) for slot in elsewhere], saved)
            self._carry_over(sums, found)
        return bool(moved)

    def _findings(self) -> list[int]:
        """Which parameters had a bad gradient in the finished samples of this step. Waits for the devices."""
        if not self._samples.folded:
            return []
        named = [slot.index for slot in self._ordered if slot.name == self._samples.nonfinite]
        return named + [control.found() for control in self._controls.values()]

    def _carry_over(self, sums: Mapping[int, tuple[Tensor, Tensor]], found: list[int]) -> None:
        """Give new slots the sums of this step's finished samples, and the devices what was found in them."""
        if found:
            for control in self._controls.values():
                control.forget(*found)
        slots = {slot.index: slot for slot in self._slots.values() if slot.index in sums}
        for arena in {slot.arena for slot in slots.values()}:
            if arena.grad_sum is None:
                arena.clear_sums()
        for index, pair in sums.items():
            slots[index].summed = True
            for own, saved in zip(slots[index].sums or (), pair, strict=True):
                own.copy_(saved)

    def _refresh(self) -> None:
        """Decide whose weights to sample: every trainable parameter, wherever it now lives."""
        if not (
            self._stale
            or any(slots.moved() for _, slots in self._active)
            or any(slot.param.requires_grad for slot in self._frozen)
            or any(place[0].requires_grad for place in self._stateless)
        ):
            return
        thawed = [place for place in self._stateless if place[0].requires_grad]
        if thawed:
            self._place(thawed, {})
        self._follow_moves([slot for slot in self._ordered if slot.param.requires_grad])
        self._activate([slot for slot in self._ordered if slot.param.requires_grad])
        self._frozen = [slot for slot in self._ordered if not slot.param.requires_grad]
        self._stale = False

    def _adopt_edits(self) -> None:
        if self._held is None:
            with torch.no_grad():
                self._follow_moves(self._ordered)
                for slot in self._ordered:
                    slot.adopt_edits()
