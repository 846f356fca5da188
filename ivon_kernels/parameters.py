"""The optimizer's parameters: their state, where they live, and the launches that walk them."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, ParamsT

from ivon_kernels import hyperparameters, sharding
from ivon_kernels.backends import Backend, DeviceFlags, Draw, choose
from ivon_kernels.backends.state import Arena, Launch, ParamState, by_backend, state_dtype
from ivon_kernels.gradients import Samples, check_parameter
from ivon_kernels.hyperparameters import GroupScalars

_MAX_SUBSETS = 64  # of the active slots, which models that leave parameters unused have
_Place = tuple[Tensor, int, int]  # parameter, its group, its index among all parameters


class Parameters(Optimizer):
    """Everything of the optimizer that users do not call: see :class:`ivon_kernels.IVON`."""

    _step_supports_amp_scaling = True
    nonfinite: Literal["raise", "skip", "ignore"]
    _seed_given: bool  # somebody chose the seed; it is not just torch's

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        self._backend_name = backend
        self._slots: dict[Tensor, ParamState] = {}
        self._ordered: list[ParamState] = []  # all slots, in the parameters' order
        self._stateless: list[_Place] = []  # frozen parameters
        self._rows = GroupScalars()
        self._controls: dict[torch.device, DeviceFlags] = {}
        self._lr: dict[int, Tensor] = {}  # learning rate of each group, with capturable
        self._lists: list[list[Tensor]] = []  # the parameters of each group
        self._stale = False  # the active slots have to be chosen again
        self._grads_in_slots = False
        self._frozen: list[ParamState] = []  # slots of parameters that were trained and are frozen now
        self._activate([])
        self._samples = Samples()
        self._held: Draw | None = None  # the sample in the weights; None: the mean
        self._skipped = 0  # steps that the host skipped
        self._mean_copies: dict[ParamState, Tensor] = {}  # handed out by mean_of, while a sample is in the weights
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
                if group["sync"] and sharding.as_dtensor(param) is not None:
                    raise ValueError(
                        f"sync=True draws other noise on every rank, but {name} is a DTensor, of which ranks hold parts"
                    )
                if param.requires_grad:  # a frozen one may be a quantized weight
                    check_parameter(param, name)
                    choose(self._backend_name, param.device, param.dtype)
            self._hold_lr()
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            raise
        self._place([place for place in self._places() if self._needs_state(place[0])], {})

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
                sizes = [sharding.memory(param).numel() for param, _, _ in bucket]
                arena = Arena(sizes, device, dtype, keep_noise=keep_noise)
                if any(backend.on_device for backend in backends):
                    if device not in self._controls:
                        self._controls[device] = DeviceFlags(device)
                    arena.control = self._controls[device]
                for position, ((param, number, index), backend) in enumerate(zip(bucket, backends, strict=True)):
                    slot = ParamState.of(param, names[param], index, number, backend, arena, position)
                    slot.set_state(saved.get(param), float(self.param_groups[number]["hess_init"]))
                    self._slots[param] = slot
                    self.state[param] = slot.state()
        self._ordered = sorted(self._slots.values(), key=lambda slot: slot.index)
        self._stateless = [place for place in self._places() if place[0] not in self._slots]
        self._lists = [group["params"] for group in self.param_groups]
        self._stale = True

    def _follow_swaps(self) -> None:
        """Take over parameters that replaced others in the groups, as Accelerate does when it shards a model (FSDP2).

        Raises:
            RuntimeError: If they do not correspond to the ones before, or those hold a sample.
        """
        lists = [group["params"] for group in self.param_groups]
        if len(lists) == len(self._lists) and all(map(operator.is_, lists, self._lists)):
            return
        before = {slot.index: slot for slot in self._ordered}
        places = self._places()
        if len(places) != len(before) + len(self._stateless) or self._held is not None or self._samples.count:
            raise RuntimeError(
                "the parameters in optimizer.param_groups were replaced by others during a step, or by another number "
                "of them; build a new optimizer, or use add_param_group"
            )
        names = self._all_names()
        saved: dict[Tensor, dict[str, Any]] = {}
        self._slots = {}
        for param, _, index in places:
            if param.requires_grad:
                check_parameter(param, names[param])
            slot = before.get(index)
            if slot is not None and slot.parameter is param:
                self._slots[param] = slot
            elif slot is not None:
                self.state.pop(slot.parameter, None)
                if slot.step and slot.parameter.shape == param.shape:  # else it starts from the parameter as it is
                    saved[param] = slot.state()
        self._activate([])
        self._place(
            [p for p in places if self._needs_state(p[0]) or (p[0] in saved and p[0] not in self._slots)], saved
        )

    def _activate(self, slots: list[ParamState]) -> None:
        """Make these the slots whose weights are sampled."""
        self._active_slots = slots
        self._active = by_backend(slots, self._rows)
        self._active_params = [slot.parameter for slot in slots]
        self._sharded = any(slot.dtensor is not None for slot in slots)
        self._fsdp = sharding.fsdp_modules(self._active_params)
        # With sync=True the ranks have to agree on whether to step, so the host decides.
        self._on_device = bool(slots) and all(backend.on_device for backend, _ in self._active) and not self.sync
        self._on_cuda = self._on_device and slots[0].param.is_cuda
        self._subsets: dict[tuple[int, ...], list[tuple[Backend, Launch]]] = {}

    def _announce(self, params: list[Tensor], fsdp: list[Any]) -> None:
        """The weights were written: autograd sees another version, and FSDP2 gathers them anew."""
        increment_version(params)
        # autocast caches casts of leaf weights until its outermost region ends, whatever their version.
        torch.clear_autocast_cache()
        self._mean_copies.clear()
        for module in fsdp:
            module.reshard()

    def _launches(self, slots: list[ParamState]) -> list[tuple[Backend, Launch]]:
        """The launches of some of the active slots; lists that were needed before are found again."""
        if len(slots) == len(self._active_slots):
            return self._active
        key = tuple(slot.index for slot in slots)
        if key not in self._subsets:
            if len(self._subsets) == _MAX_SUBSETS:
                self._subsets.clear()
            self._subsets[key] = by_backend(slots, self._rows)
        return self._subsets[key]

    def _follow_moves(self, slots: list[ParamState]) -> bool:
        """Keep up with parameters whose memory, strides, device or dtype changed. Returns whether there were any."""
        moved = [slot for slot in slots if slot.moved()]
        for slot in moved:
            slot.remember_storage()
            if slot.param.shape != slot.mean.shape:
                raise RuntimeError(
                    f"{slot.name} had shape {tuple(slot.mean.shape)} when the optimizer was built and has "
                    f"{tuple(slot.param.shape)} now; build a new optimizer"
                )
            check_parameter(slot.parameter, slot.name)
        elsewhere = [
            slot
            for slot in moved
            if (slot.param.device, state_dtype(slot.param.dtype)) != (slot.mean.device, slot.mean.dtype)
            or slot.backend.unsupported(slot.param.device, slot.param.dtype) is not None
        ]
        if elsewhere:
            saved = {slot.parameter: slot.state() for slot in elsewhere}
            sums = {slot.index: slot.sums for slot in elsewhere if slot.sums is not None}
            found = self._findings()
            self._place([(slot.parameter, slot.group, slot.index) for slot in elsewhere], saved)
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
        self._follow_swaps()
        if not (
            self._stale
            or any(slots.moved() for _, slots in self._active)
            or any(slot.parameter.requires_grad for slot in self._frozen)
            or any(place[0].requires_grad for place in self._stateless)
        ):
            return
        thawed = [place for place in self._stateless if place[0].requires_grad]
        if thawed:
            names = self._all_names()
            for param, _, _ in thawed:
                check_parameter(param, names[param])
            self._place(thawed, {})
        trained = [slot.parameter for slot in self._ordered if slot.parameter.requires_grad]
        self._follow_moves([self._slots[param] for param in trained])
        self._activate([self._slots[param] for param in trained])
        self._frozen = [slot for slot in self._ordered if not slot.parameter.requires_grad]
        self._stale = False

    def _adopt_edits(self) -> None:
        self._follow_swaps()
        if self._held is None:
            with torch.no_grad():
                self._follow_moves(self._ordered)
                for slot in self._ordered:
                    slot.adopt_edits()
