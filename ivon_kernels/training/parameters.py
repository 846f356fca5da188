"""The optimizer's parameters: where their state lives, and which of them are trained now."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ivon_kernels import sharding
from ivon_kernels.backends import choose
from ivon_kernels.backends.state import Arena, DeviceFlags, ParamState, state_dtype
from ivon_kernels.checkpoint import check_entry
from ivon_kernels.hyperparameters import GroupScalars, validate
from ivon_kernels.training.checks import check_parameter
from ivon_kernels.training.overlap import refuse_shared
from ivon_kernels.training.table import StateTable
from ivon_kernels.weights import Selection, take_back

__all__ = ["Parameters"]

_REQUIRES_GRAD = operator.attrgetter("requires_grad")

_Place = tuple[Tensor, int, int]  # parameter, its group, its index among all parameters
_Saved = Mapping[Tensor, Mapping[str, Any]]


class Parameters:
    """State for every parameter that is trained, kept where the parameter is: it follows moves, casts and freezing.

    Args:
        backend: Name of a backend, or None for the fastest of each parameter.
        capturable: Keep learning rates on the device, for CUDA graphs.

    Attributes:
        groups: The optimizer's ``param_groups``.
        table: The optimizer's ``state``.
        states: The state of each parameter that has some.
        ordered: All of them, in the parameters' order.
        active: The parameters that are trained now.
        numbered: Whether the states' indices are the parameters' positions.
        on_device: Whether devices decide on their step.
        scalars: What the groups tell a launch.
        flags: What kernels share on each device.
    """

    def __init__(self, backend: str | None, capturable: bool) -> None:
        # For good.
        self.backend = backend
        self.capturable = capturable
        self.scalars = GroupScalars()
        # The optimizer's ``param_groups`` and ``state``, which torch replaces when it loads a state dict.
        self.groups: list[dict[str, Any]] = []
        self.table = StateTable()
        self._defaults: dict[str, Any] = {}
        # Follow the groups and where their parameters are.
        self.states: dict[Tensor, ParamState] = {}
        self.ordered: list[ParamState] = []
        self.flags: dict[torch.device, DeviceFlags] = {}
        self._stateless: list[_Place] = []  # frozen ones
        self._known: list[_Members] = []  # of each group
        self._lr: dict[int, Tensor] = {}  # the learning rate of each group, with capturable
        # Follow which parameters are trained.
        self.active = Selection([], self.scalars, backend)
        self.on_device = False
        self._others: list[Tensor] = []  # parameters that are not
        self._stale = False  # they have to be chosen again
        self.numbered = True

    def bind(self, defaults: dict[str, Any]) -> None:
        """Work on an optimizer's ``defaults``."""
        self._defaults = defaults

    def take_groups(self, groups: list[dict[str, Any]]) -> None:
        """Work on these ``param_groups`` from now on; :meth:`follow_groups` looks what that changes."""
        self.groups = groups

    # ---- what they are -------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """Seed of the noise; it travels in the parameter groups of a state dict."""
        seed: int = self.groups[0]["seed"]
        return seed

    def reseed(self, seed: int) -> None:
        """Use another seed from now on."""
        for settings in (self._defaults, *self.groups):
            settings["seed"] = seed

    @property
    def sync(self) -> bool:
        """Whether every rank draws noise of its own."""
        return bool(self.groups) and bool(self.groups[0]["sync"])

    @property
    def backends(self) -> dict[str, str]:
        """The backend of each kind of parameter: ``{"cpu/float32": "cpu"}``."""
        kinds = dict.fromkeys((state.param.device, state.param.dtype) for state in self.states.values())
        return {
            f"{device}/{str(dtype).removeprefix('torch.')}": choose(self.backend, device, dtype).name
            for device, dtype in kinds
        }

    def names(self) -> dict[Tensor, str]:
        """What each parameter is called in messages."""
        return {
            param: name
            for number, group in enumerate(self.groups)
            for param, name in zip(group["params"], _names(group, number), strict=True)
        }

    def has(self, param: Tensor) -> bool:
        """Whether the optimizer has the parameter, with state or without."""
        return param in self.states or any(param is place[0] for place in self._stateless)

    @property
    def is_empty(self) -> bool:
        """Whether there are no parameters at all."""
        return not (self.ordered or self._stateless)

    @property
    def count(self) -> int:
        """How many there are, frozen ones included."""
        return len(self.ordered) + len(self._stateless)

    # ---- groups --------------------------------------------------------------------------------------------------

    def check_last_group(self) -> None:
        """Refuse the group that was added last.

        Raises:
            ValueError, TypeError, RuntimeError: For a hyperparameter or parameter that cannot be used.
        """
        number = len(self.groups) - 1
        group = self.groups[-1]
        validate(group, f"parameter group {number}")
        for param, name in zip(group["params"], _names(group, number), strict=True):
            if group["sync"] and sharding.as_dtensor(param) is not None:
                raise ValueError(
                    f"sync=True draws other noise on every rank, but {name} is a DTensor, of which ranks hold parts"
                )
            if param.requires_grad:  # a frozen one may be a quantized weight
                check_parameter(param, name)
                choose(self.backend, param.device, param.dtype)
        self._refuse_shared()
        self.hold_lr()

    def add_groups(self) -> None:
        """Give the parameters of new groups state."""
        self._place([place for place in self._places() if self._needs_state(place[0])], {})

    def hold_lr(self) -> None:
        """Keep each group's learning rate in the float64 tensor that captured graphs read (``capturable=True``).

        Schedulers of torch fill such a tensor in place; one that assigns a number is followed at the next sample.
        """
        if not self.capturable:
            return
        for number, group in enumerate(self.groups):
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

    def check_capture(self) -> None:
        """Refuse to be captured by a CUDA graph whose replays would not train."""
        if self.capturable:
            self.hold_lr()
            if not self.on_device:
                raise RuntimeError(
                    "capturable=True needs the triton or the cuda backend for every parameter, and sync=False; "
                    f"the parameters have {self.backends or 'none'}"
                )
        elif self.active.on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, but this optimizer was built with capturable=False: its replays would "
                "keep the learning rate of the capture; build it with capturable=True"
            )

    # ---- state ---------------------------------------------------------------------------------------------------

    def load(self, saved: _Saved) -> None:
        """Set the state of all parameters: from `saved` where it has some, else to the initial one."""
        self.activate([])
        self.table.clear()
        for state in self.ordered:
            state.mark_summed(False)
            state.set_state(saved.get(state.parameter), float(self.groups[state.group]["hess_init"]))
            self.table.show(state, saved.get(state.parameter, {}))
        self._place(self._waiting(saved), saved)
        self.table.settle()

    def follow_state(self, *, idle: bool) -> list[ParamState]:
        """Take over what somebody has done to ``optimizer.state``: see :meth:`StateTable.follow`.

        Args:
            idle: Whether no step is under way and the weights hold the mean.

        Returns:
            The states whose mean is another now: their weights have to be written.

        Raises:
            ValueError: If an entry does not fit its parameter; nothing is changed then.
            RuntimeError: If a step is under way, which needs the values that its sample was drawn with.
        """
        if not self.table.changed:
            return []
        rewritten = self.table.follow(self.ordered, self.groups, idle=idle)
        saved = self.table.others(self.states)
        given = [place for place in self._stateless if place[0] in saved]
        names = self.names()
        for param, _, _ in given:
            check_entry(saved[param], names[param], param.shape)
        self._place(given, saved)
        self.table.settle()
        return rewritten

    def _places(self) -> list[_Place]:
        params = [(param, number) for number, group in enumerate(self.groups) for param in group["params"]]
        return [(param, number, index) for index, (param, number) in enumerate(params)]

    def _needs_state(self, param: Tensor) -> bool:
        return param.requires_grad and param not in self.states

    def _waiting(self, saved: _Saved) -> list[_Place]:
        """The places without state that are trained, or have some in `saved`."""
        places = self._places()
        return [p for p in places if self._needs_state(p[0]) or (p[0] in saved and p[0] not in self.states)]

    def _place(self, places: Iterable[_Place], saved: _Saved) -> None:
        """Give parameters state in new arenas: a copy of what `saved` has, else the initial state."""
        places = list(places)
        names = self.names()
        # Their weights are about to be taken for the mean.
        take_back([param for param, _, _ in places if param not in self.states])
        buckets: dict[tuple[torch.device, torch.dtype], list[_Place]] = {}
        for place in places:
            buckets.setdefault((place[0].device, state_dtype(place[0].dtype)), []).append(place)
        # Outside inference mode: a tensor that was made inside is refused by every update outside.
        with torch.inference_mode(False), torch.no_grad():
            for (device, dtype), bucket in buckets.items():
                arena = self._arena(device, dtype, [param for param, _, _ in bucket])
                for position, (param, number, index) in enumerate(bucket):
                    state = ParamState.of(param, names[param], index, number, arena, position)
                    state.set_state(saved.get(param), float(self.groups[number]["hess_init"]))
                    self.states[param] = state
                    self.table.show(state, saved.get(param, {}))
        self._settle()

    def _settle(self) -> None:
        """Note what there is now."""
        self.ordered = sorted(self.states.values(), key=lambda state: state.index)
        self._stateless = [place for place in self._places() if place[0] not in self.states]
        self._known = [_Members(group["params"]) for group in self.groups]
        self._note_others()
        self._stale = True

    def _arena(self, device: torch.device, dtype: torch.dtype, params: list[Tensor]) -> Arena:
        backends = [choose(self.backend, device, param.dtype) for param in params]
        if any(backend.on_device for backend in backends) and device not in self.flags:
            self.flags[device] = DeviceFlags(device)
        sizes = [sharding.memory(param).numel() for param in params]
        keep_noise = any(backend.keeps_noise for backend in backends)
        return Arena(sizes, device, dtype, keep_noise=keep_noise, flags=self.flags.get(device))

    # ---- following the parameters --------------------------------------------------------------------------------

    def activate(self, states: list[ParamState]) -> None:
        """Make these the parameters that are trained."""
        self.active = Selection(states, self.scalars, self.backend)
        # With sync=True the ranks have to agree on whether to step, so the host decides.
        self.on_device = self.active.on_device and not self.sync
        self._note_others()

    def _note_others(self) -> None:
        active = set(map(id, self.active.params))
        self._others = [param for group in self.groups for param in group["params"] if id(param) not in active]

    @property
    def unfrozen(self) -> bool:
        """Whether a parameter that is not active requires a gradient."""
        return any(map(_REQUIRES_GRAD, self._others))

    def refresh(self, *, keep: bool) -> bool:
        """Decide whose weights to sample: every trainable parameter, wherever it now lives.

        Args:
            keep: A step is under way: what takes part in it stays, frozen since or not.

        Returns:
            Whether some have moved to new state.
        """
        if not (self._stale or self.active.moved() or self.unfrozen):
            return False
        thawed = [place for place in self._stateless if place[0].requires_grad]
        if thawed:
            names = self.names()
            for param, _, _ in thawed:
                check_parameter(param, names[param])
            self._place(thawed, {})
            self._refuse_shared()
        active = set(self.active.states) if keep else set()
        trained = [
            state.parameter
            for state in self.ordered
            if state.parameter.requires_grad or (keep and (state in active or state.summed))
        ]
        moved = self._follow_moves([self.states[param] for param in trained])
        self.activate([self.states[param] for param in trained])
        self._stale = False
        return moved

    def catch_up(self) -> bool:
        """Follow active parameters that have moved since they were sampled. Returns whether some have new state."""
        if not self.active.moved(trained=False):
            return False
        moved = self._follow_moves(self.active.states)
        self.activate([self.states[state.parameter] for state in self.active.states])
        # What was frozen or thawed meanwhile is followed at the next sample: the step needs those that were sampled.
        self._stale = True
        return moved

    def other_gradients(self) -> dict[Tensor, tuple[Tensor, int]]:
        """The gradients of parameters that are not active, and their versions."""
        return {param: (param.grad, param.grad._version) for param in self._others if param.grad is not None}

    def follow_groups(self, *, idle: bool) -> list[ParamState]:
        """Follow parameters that were replaced, added or taken out, and groups that are others.

        State goes with its parameter, as in torch's optimizers: a new one starts anew. Only where all were replaced at
        once by others of the same shapes, as Accelerate does when it shards a model (FSDP2), it goes by position.

        Args:
            idle: Whether no step is under way and the weights hold the mean.

        Returns:
            The states that are gone; their weights may hold a sample.

        Raises:
            ValueError, TypeError: If a new parameter or group cannot be used; nothing is changed then.
            RuntimeError: If all were replaced during a step.
        """
        same = len(self.groups) == len(self._known) and all(map(_Members.are_those_of, self._known, self.groups))
        if same and (self.numbered or not idle):
            return []
        places, names = self._places(), self.names()
        if len(names) != len(places):
            raise ValueError("a parameter is more than once in optimizer.param_groups")
        for number, group in enumerate(self.groups):
            validate(group, f"parameter group {number}")
        for param, _, _ in places:
            if param.requires_grad and param not in self.states:
                check_parameter(param, names[param])
        self._refuse_shared()
        self.hold_lr()
        saved = self._swapped(places, idle=idle)
        gone = [state for state in self.ordered if state.parameter not in names]
        for state in gone:
            del self.states[state.parameter]
            self.table.forget(state.parameter)
        for param, number, index in places:
            if param in self.states:
                # A sample in the weights was drawn by the number, which therefore stays until it is gone.
                self.states[param].belong(names[param], number, index if idle else self.states[param].index)
        self.numbered = idle
        waiting = self._waiting(saved)
        if not idle:
            free = 1 + max((state.index for state in self.states.values()), default=-1)
            waiting = [(param, number, free + i) for i, (param, number, _) in enumerate(waiting)]
        self._place(waiting, saved)
        return gone

    def _swapped(self, places: list[_Place], *, idle: bool) -> _Saved:
        """What was learned, by the new parameters, where a sharded one was put in the place of every whole one."""
        before = [param for members in self._known for param in members.copy]
        if len(before) != len(places) or not any(sharding.as_dtensor(place[0]) is not None for place in places):
            return {}
        if {place[0] for place in places}.intersection(before):
            return {}
        if not idle:
            raise RuntimeError(
                "all parameters in optimizer.param_groups were replaced by sharded ones during a step; shard the model "
                "between steps"
            )
        learned = {}
        for old, (new, _, _) in zip(before, places, strict=True):
            state = self.states.get(old)
            if (
                state is not None and state.step and old.shape == new.shape
            ):  # else it starts from the parameter as it is
                learned[new] = state.state()
        return learned

    def _refuse_shared(self) -> None:
        """Refuse trained parameters that share memory."""
        refuse_shared({param: name for param, name in self.names().items() if param.requires_grad})

    def adopt_edits(self) -> bool:
        """Take weights that were edited from outside over as the new mean. They must hold the mean.

        Returns:
            Whether some have new state.
        """
        with torch.no_grad():
            moved = self._follow_moves(self.ordered)
            for state in self.ordered:
                state.adopt_edits()
        return moved

    def _follow_moves(self, states: list[ParamState]) -> bool:
        """Follow parameters whose memory, strides, device or dtype changed. Returns whether some have new state."""
        moved = [state for state in states if state.moved()]
        for state in moved:
            state.remember_storage()
            if state.param.shape != state.mean.shape:
                raise RuntimeError(
                    f"{state.name} had shape {tuple(state.mean.shape)} when the optimizer was built and has "
                    f"{tuple(state.param.shape)} now; build a new optimizer"
                )
            check_parameter(state.parameter, state.name)
        if moved:
            self._refuse_shared()
        elsewhere = [
            state
            for state in moved
            if (state.param.device, state_dtype(state.param.dtype)) != (state.mean.device, state.mean.dtype)
        ]
        if elsewhere:
            # Read before the states are replaced: both are views of the old arenas.
            sums = {state.index: state.sums for state in elsewhere if state.sums is not None}
            saved = {state.parameter: state.state() for state in elsewhere}
            self._place([(state.parameter, state.group, state.index) for state in elsewhere], saved)
            self.carry_over(sums)
        return bool(elsewhere)

    def carry_over(self, sums: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Give new state the sums of this step's finished samples, by the parameters' index."""
        states = [state for state in self.states.values() if state.index in sums]
        for arena in {state.arena for state in states}:
            if arena.grad_sum is None:
                arena.clear_sums()
        for state in states:
            state.mark_summed(True)
            for own, saved in zip(state.sums or (), sums[state.index], strict=True):
                own.copy_(saved)


def _names(group: dict[str, Any], number: int) -> list[str]:
    params = group["params"]
    given = list(group.get("param_names", ()))[: len(params)]  # others may have been appended, or taken out, since
    rest = enumerate(params[len(given) :], len(given))
    return given + [f"param_groups[{number}]['params'][{i}] of shape {tuple(p.shape)}" for i, p in rest]


class _Members:
    """The parameters that a group had when its list was last looked at."""

    def __init__(self, params: list[Tensor]) -> None:
        self.list, self.copy = params, list(params)
        self._scalars = [i for i, param in enumerate(params) if param.numel() == 1]

    def are_those_of(self, group: dict[str, Any]) -> bool:
        """Whether the group has the same list with the same parameters in it."""
        params = group["params"]
        if params is not self.list or len(params) != len(self.copy):
            return False
        # Lists are compared by identity first, ten times as fast as an `is` for each. Where they differ torch compares
        # elements, and cannot say true or false of them, but for one element.
        try:
            return bool(params == self.copy) and all(params[i] is self.copy[i] for i in self._scalars)
        except Exception:  # of whatever kind of tensor
            return False
