"""What the GPU backends share: the device decides whether a step is taken, and the host never waits for it."""

from __future__ import annotations

from abc import abstractmethod

from ivon_kernels.backends.base import Backend, Draw, Guard, Launch

_UNGUARDED = Guard()


class DeviceBackend(Backend):
    """A backend whose kernels count steps, check gradients and honour a GradScaler by themselves.

    A launch's states lie on one device, in any number of arenas and dtypes.
    """

    on_device = True

    @abstractmethod
    def check(self, launch: Launch) -> None:
        """Note in the device's flags if a gradient holds inf or nan; the next final step is then skipped."""

    def find_nonfinite(self, launch: Launch) -> int | None:
        """As every backend; waits for the device. Used where backends of both kinds train together."""
        self.check(launch)
        flags = launch.states[0].arena.flags
        assert flags is not None
        bad = flags.found()
        flags.forget()
        return next((i for i, state in enumerate(launch.states) if state.index == bad), None)

    @abstractmethod
    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool, guard: Guard = _UNGUARDED) -> None: ...
