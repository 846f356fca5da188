"""The one writer into a model's weights: samples go in and the mean comes back here, and nowhere else."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ivon_kernels import sharding
from ivon_kernels.backends import Draw, Launch, launches_of
from ivon_kernels.backends.state import ParamState
from ivon_kernels.hyperparameters import GroupScalars

__all__ = ["EDITED", "Selection", "Weights"]

EDITED = (
    "the weights were written while they held a sample, by another optimizer or by load_state_dict, and that was lost: "
    "give every parameter to one optimizer, and load weights before optimizer.train() or after optimizer.eval()"
)

_MAX_PARTS = 64  # of a selection, which models that leave parameters unused have
_WATCHED = 8  # parameters, at most
_VERSION_OF = operator.attrgetter("_version")


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
        self._parts: dict[tuple[int, ...], list[Launch]] = {}

    def part(self, states: list[ParamState]) -> list[Launch]:
        """The launches of some of the states; those that were needed before are found again."""
        if len(states) == len(self.states):
            return self.launches
        key = tuple(state.index for state in states)
        if key not in self._parts:
            if len(self._parts) == _MAX_PARTS:
                self._parts.clear()
            self._parts[key] = launches_of(states, self._scalars, self._backend)
        return self._parts[key]

    def moved(self, *, trained: bool = True) -> bool:
        """Whether a parameter's memory, strides or dtype, or with `trained` its ``requires_grad``, has changed."""
        return any(launch.moved(trained=trained) for launch in self.launches)

    def announce(self) -> None:
        """The weights were written behind torch's back: whoever keeps something that was made of them shall see it.

        Autograd sees another version, autocast casts again, FSDP2 gathers again.
        """
        increment_version(self.tracked)
        # autocast keeps casts of leaf weights until its outermost region ends, whatever their version.
        torch.clear_autocast_cache()
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
        self._watched: list[Tensor] = []
        self._version = 0  # of the watched weights when the sample was put there
        self._mean_copies: dict[ParamState, Tensor] = {}  # handed out by mean_of, while a sample is in the weights

    # ---- writing -------------------------------------------------------------------------------------------------

    def put(self, selection: Selection, draw: Draw) -> None:
        """Weights <- mean + sigma eps. Weights that were edited while they held the mean are the new mean.

        Args:
            selection: Whose weights. While they hold a sample it has to be the same parameters.
            draw: Which sample.

        Raises:
            RuntimeError: If they hold somebody else's sample.
        """
        adopt = self.held is None
        if adopt:
            self.refuse_others(selection.params)
        for launch in selection.launches:
            launch.backend.sample(launch, draw, adopt)
        self.settle(selection, draw)

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
            _HOLDERS.discard(self)
        else:
            self._hold(selection)

    def _hold(self, selection: Selection) -> None:
        self._selection = selection
        self._watched = selection.tracked[:: len(selection.tracked) // _WATCHED + 1]
        self._version = sum(map(_VERSION_OF, self._watched))
        _HOLDERS.add(self)

    def write(self, selection: Selection, draw: Draw | None) -> None:
        """Weights <- a sample or (None) the mean, for good or within :meth:`borrowed`: nothing else changes hands."""
        for launch in selection.launches:
            if draw is None:
                launch.backend.restore(launch)
            else:
                launch.backend.sample(launch, draw, adopt=False)
        selection.announce()

    def follow(self, selection: Selection) -> None:
        """The parameters that hold the sample have other memory now."""
        if self.held is not None:
            self._selection = selection

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
        """Whether the weights were written by somebody else while they hold a sample, as far as autograd knows.

        Only a few of them are watched: who writes at all, another optimizer or load_state_dict, hardly ever leaves
        them out.
        """
        return self.held is not None and self._version != sum(map(_VERSION_OF, self._watched))

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
        for other in list(_HOLDERS):
            if other is not self and other._holds_any(params):
                raise RuntimeError(f"the parameters hold a sample of {other.owner}")

    def _holds_any(self, params: Sequence[Tensor]) -> bool:
        if self._selection is None:
            return False
        own = set(map(id, self._selection.params))
        return any(id(param) in own for param in params)


_HOLDERS: weakref.WeakSet[Weights] = weakref.WeakSet()
