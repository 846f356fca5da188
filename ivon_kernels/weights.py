"""The one writer into a model's weights: samples go in and the mean comes back here, and nowhere else."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ivon_kernels import caches, sharding
from ivon_kernels.backends import Draw, Launch, launches_of
from ivon_kernels.backends.addresses import Versions
from ivon_kernels.backends.state import ParamState
from ivon_kernels.hyperparameters import GroupScalars

__all__ = ["EDITED", "Selection", "Weights", "take_back"]

EDITED = (
    "the weights were written while they held a sample, by another optimizer or by load_state_dict, and that was lost: "
    "give every parameter to one optimizer, and load weights before optimizer.train() or after optimizer.eval()"
)

_MAX_PARTS = 64  # of a selection, which models that leave parameters unused have


class Selection:
    """Some parameters and the launches that walk them.

    Attributes:
        states: The parameters' states.
        params: The parameters, as they were given to the optimizer: DTensors where they are sharded.
        launches: One for each backend and device.
        on_device: Whether the devices can decide on a step.
        on_cuda: Whether they are NVIDIA's or AMD's, whose graphs can be captured.
        sharded: Whether some of the parameters are DTensors.
        tracked: The parameters whose writes autograd counts.
        versions: How many there were.
    """

    def __init__(self, states: list[ParamState], scalars: GroupScalars, backend: str | None) -> None:
        self.states = states
        self.params = [state.parameter for state in states]
        self.launches = launches_of(states, scalars, backend)
        self.on_device = bool(states) and all(launch.backend.on_device for launch in self.launches)
        self.on_cuda = self.on_device and states[0].param.is_cuda
        self.sharded = any(state.dtensor is not None for state in states)
        self._scalars, self._backend = scalars, backend
        self._fsdp = sharding.fsdp_modules(self.params)
        # Tensors that were made in inference mode have no version: increment_version and reading it raise.
        self.tracked = [param for param in self.params if not param.is_inference()]
        self.versions = Versions(self.tracked)
        self._parts: dict[tuple[int, ...], list[Launch]] = {}

    @functools.cached_property
    def places(self) -> tuple[set[int], set[int]]:
        """Ids of the parameters, and the addresses of their memory."""
        memory = {state.param.data_ptr() for state in self.states if state.param.numel()}
        return set(map(id, self.params)), memory

    def select(self, states: list[ParamState]) -> Selection:
        """Some of the states."""
        return Selection(states, self._scalars, self._backend)

    def part(self, states: list[ParamState]) -> list[Launch]:
        """The launches of some of the states; those that were needed before are found again."""
        if len(states) == len(self.states):
            return self.launches
        if not states:
            return []
        key = tuple(state.index for state in states)
        if key not in self._parts:
            if len(self._parts) == _MAX_PARTS:
                self._parts.clear()
            self._parts[key] = launches_of(states, self._scalars, self._backend)
        return self._parts[key]

    def split(self, before: list[ParamState]) -> list[tuple[Launch, bool]]:
        """All launches, and whether theirs are other states than those of before."""
        if before is self.states:
            return [(launch, False) for launch in self.launches]
        if not before:
            return [(launch, True) for launch in self.launches]
        known = set(before)
        old, new = ([state for state in self.states if (state in known) is is_old] for is_old in (True, False))
        return [(launch, False) for launch in self.part(old)] + [(launch, True) for launch in self.part(new)]

    def moved(self, *, trained: bool = True) -> bool:
        """Whether a parameter's memory, strides or dtype, or with `trained` its ``requires_grad``, has changed."""
        return any(launch.moved(trained=trained) for launch in self.launches)

    def announce(self) -> None:
        """The weights were written behind torch's back: whoever keeps something that was made of them shall see it.

        Autograd sees another version, autocast casts again, FSDP2 gathers again, other caches are empty.
        """
        increment_version(self.tracked)
        caches.clear()
        for module in self._fsdp:
            module.reshard()


class Weights:
    """What the weights of some parameters hold: the mean, or a sample.

    Two at a time would each take the other's sample for the mean, so everybody who holds one is known to all.

    Args:
        owner: Who puts samples there and how they let go, for the error that another one gets.

    Attributes:
        held: The sample; None: the mean.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.held: Draw | None = None
        self._selection: Selection | None = None  # whose weights hold the sample
        self._borrows = 0  # blocks that hold something in the weights now and give them back
        self._version = 0  # of the weights when the sample was put there
        self._mean_copies: dict[ParamState, Tensor] = {}  # handed out by mean_of, while a sample is in the weights
        self._let_go: weakref.WeakMethod[Callable[[], None]] | None = None

    def let_go_by(self, restore: Callable[[], None]) -> None:
        """Put the mean back by this bound method, whose object is not kept alive, when somebody else needs it."""
        # A strong reference would be a circle: the state would wait for a collection after its optimizer is gone.
        self._let_go = weakref.WeakMethod(restore)

    # ---- writing -------------------------------------------------------------------------------------------------

    def put(self, selection: Selection, draw: Draw) -> None:
        """Weights <- mean + sigma eps. Weights that were edited while they held the mean are the new mean.

        Args:
            selection: Whose weights; all of those that hold a sample now, and perhaps more.
            draw: Which sample.

        Raises:
            RuntimeError: If they hold somebody else's sample.
        """
        before = [] if self.held is None or self._selection is None else self._selection.states
        if before is not selection.states:
            self.refuse_others(selection.params)
        for launch, adopt in selection.split(before):
            launch.backend.sample(launch, draw, adopt)
        self.settle(selection, draw)

    def extend(self, selection: Selection, draw: Draw) -> None:
        """The sample that some of the weights hold goes into the others too; what autograd has of the first stays good.

        Raises:
            RuntimeError: If the others hold somebody else's sample.
        """
        known = set() if self._selection is None else set(self._selection.states)
        others = selection.select([state for state in selection.states if state not in known])
        self.refuse_others(others.params)
        for launch in others.launches:
            launch.backend.sample(launch, draw, adopt=True)
        others.announce()
        self._mean_copies.clear()
        self._hold(selection)

    def restore(self, selection: Selection) -> None:
        """Weights <- mean, whatever they hold."""
        for launch in selection.launches:
            launch.backend.restore(launch)
        self.settle(selection, None)

    def settle(self, selection: Selection, draw: Draw | None) -> None:
        """Kernels have written the weights, which hold this sample now (None: the mean)."""
        self.held = draw
        self._mean_copies.clear()
        selection.announce()
        if draw is None and not self._borrows:
            self._selection = None
            _HOLDERS.pop(id(self), None)
        else:
            self._hold(selection)

    def _hold(self, selection: Selection) -> None:
        self._selection = selection
        self._version = selection.versions.total()
        _HOLDERS[id(self)] = self

    def write(self, selection: Selection, draw: Draw | None) -> None:
        """Weights <- a sample or (None) the mean, for good or within :meth:`borrowed`: nothing else changes hands."""
        for launch in selection.launches:
            if draw is None:
                launch.backend.restore(launch)
            else:
                launch.backend.sample(launch, draw, adopt=False)
        selection.announce()

    def follow(self, selection: Selection) -> None:
        """The parameters that hold the sample have other memory now, or are fewer."""
        if self.held is not None and self._selection is not None:
            writes = self._selection.versions.total() - self._version
            self._selection, self._version = selection, selection.versions.total() - writes

    @contextmanager
    def borrowed(self, selection: Selection) -> Iterator[None]:
        """What the weights hold now, edits included, comes back after the block, bit for bit, whatever happens.

        Raises:
            RuntimeError: If they hold somebody else's sample.
        """
        self.refuse_others(selection.params)
        before = [state.param.detach().clone() for state in selection.states]
        outer = self.held
        self._borrows += 1
        self._hold(selection)
        try:
            yield
        finally:
            self._borrows -= 1
            with torch.no_grad():
                for state, value in zip(selection.states, before, strict=True):
                    state.param.detach().copy_(value)
            self.settle(selection, outer)

    # ---- what they hold ------------------------------------------------------------------------------------------

    @property
    def edited(self) -> bool:
        """Whether the weights were written by somebody else while they hold a sample, as far as autograd knows."""
        return (
            self.held is not None and self._selection is not None and self._version != self._selection.versions.total()
        )

    def mean_of(self, state: ParamState) -> Tensor:
        """The mean of a parameter, in its dtype and placement.

        Returns:
            The parameter itself (detached) where it holds the mean, else a copy: the same one until the weights change.
        """
        if self._selection is None or state not in self._selection.states:
            return state.parameter.detach()
        if state not in self._mean_copies:
            copy = torch.empty_like(state.param, requires_grad=False).copy_(state.mean)
            self._mean_copies[state] = state.outside(copy)
        return self._mean_copies[state]

    def refuse_others(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters that hold somebody else's sample.

        Raises:
            RuntimeError: If there are any.
        """
        for other in _holders_of(params, but=self):
            gc.collect()  # an optimizer that nobody has any more may wait for this to give back the mean
            if other.holds_any(params):
                raise RuntimeError(f"the parameters hold a sample of {other.owner}")

    def give_back(self) -> bool:
        """Put the mean back because somebody else needs it. Returns whether it is there."""
        restore = None if self._let_go is None else self._let_go()
        if restore is not None and not self._borrows:
            restore()
        return self._selection is None

    def holds_any(self, params: Iterable[Tensor]) -> bool:
        """Whether some of the parameters, or others in their memory, hold the sample."""
        selection = self._selection  # another thread may let it go meanwhile
        if selection is None:
            return False
        objects, addresses = selection.places
        return any(id(param) in objects or sharding.memory(param).data_ptr() in addresses for param in params)


# Plain and strong: its copy is atomic where threads come and go, and a sample never outlives who knows its mean.
_HOLDERS: dict[int, Weights] = {}


def _holders_of(params: Sequence[Tensor], but: Weights | None = None) -> list[Weights]:
    return [other for other in _HOLDERS.copy().values() if other is not but and other.holds_any(params)]


def take_back(params: Sequence[Tensor]) -> None:
    """Have everybody whose sample the parameters hold put the mean back: they get another owner.

    An optimizer that held it goes on as after its ``eval()``.

    Raises:
        RuntimeError: If the sample is a posterior's, in whose block nobody may take them over.
    """
    for holder in _holders_of(params):
        if not holder.give_back():
            raise RuntimeError(f"the parameters hold a sample of {holder.owner}")
