"""What the callbacks say during a run: one line at the start, numbers beside the loss, and advice, each once."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ivon_kernels.hyperparameters import first_sigma, highest_lr
from ivon_kernels.optimizer import IVON
from ivon_kernels.training.advice import Advice, told_another_size, warn_once

__all__ = ["LossWatch", "Voice", "count_examples"]

EARLY = 10  # steps after which a run can be judged
_FEWEST = 8  # losses
_SURELY = 4.0  # standard deviations
_NOTICED = 0.02  # of the first loss

_log = logging.getLogger("ivon_kernels")


class Voice:
    """Speaks for one optimizer during one run.

    Args:
        ivon: The optimizer.
        steps: Optimizer steps of the whole run, or None where it has no end.
        num_data: Training examples, or None where they cannot be counted.
        speaks: Whether this process does; of several that train together one should.
        said: What was said in earlier runs.
    """

    def __init__(
        self, ivon: IVON, *, steps: int | None, num_data: int | None, speaks: bool = True, said: set[str] | None = None
    ) -> None:
        self.ivon = ivon
        self.num_data = num_data
        self.steps = steps
        self._speaks = speaks
        self._said = set() if said is None else said
        self._said |= ivon.advised
        self._losses = LossWatch()

    def begin(self, *, told: float | None = None, notes: Iterable[str] = ()) -> None:
        """Say what was chosen, and what cannot go well.

        Args:
            told: The number of examples that the optimizer was made for, where its user gave one.
            notes: What else there is to say in the line.
        """
        if self._speaks:
            say("; ".join((chosen(self.ivon), *notes)))
        if told is not None and self.num_data is not None and (advice := told_another_size(told, self.num_data)):
            self.warn([advice])
        self._check(self.steps)

    def step(self, taken: int) -> None:
        """A step was taken, the `taken`-th of the run: look at the first ones early."""
        if taken == EARLY and (self.steps is None or self.steps > EARLY):
            self._check(self.steps)

    def numbers(self) -> dict[str, float]:
        """What to log beside the loss: ``ivon/sigma``, ``ivon/snr``, ``ivon/clipped``, ``ivon/hess``.

        One look at about 16,000 elements of the state: 6 ms for 450 tensors of 15 million weights on one core, where a
        step takes 140 ms.
        """
        return {f"ivon/{name}": value for name, value in self.ivon.glance().items()}

    def hear(self, loss: float) -> None:
        """A loss was logged: say so if the run has fallen off."""
        self._losses.note(loss)
        if sentence := self._losses.fallen():
            lr = max(map(highest_lr, self.ivon.param_groups))
            remedy = f"start again with a third of the learning rate (lr={lr / 3:.2g} instead of {lr:.2g})"
            self.warn([Advice(f"{sentence}: {remedy}", about="loss")])

    def end(self, taken: int) -> None:
        """Training has ended after `taken` steps."""
        if taken:
            self._check(taken)

    def warn(self, advice: Iterable[Advice]) -> None:
        """Warn of what was not said yet."""
        if self._speaks:
            warn_once(self._said, advice, stacklevel=3)

    def _check(self, steps: int | None) -> None:
        if self._speaks:
            found = self.ivon.check(steps=steps, num_data=self.num_data)
            self.warn(sentence for sentence in found if isinstance(sentence, Advice))


def count_examples(dataloader: Any) -> int | None:
    """The examples of a data loader, where they can be counted."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError, NotImplementedError):  # no loader, no dataset, or a stream
        return None


def chosen(ivon: IVON) -> str:
    """The settings of an optimizer, in a line."""
    trained = [param for group in ivon.param_groups for param in group["params"] if param.requires_grad]
    groups = [group for group in ivon.param_groups if group["params"]]
    lines = []
    for group in groups:
        settings = f"lr {highest_lr(group):.4g}, sigma {first_sigma(group):.2g}"
        settings += f", ess {float(group['ess']):.3g}, hess_init {float(group['hess_init']):.3g}"
        if math.isfinite(float(group["clip_radius"])):
            settings += f", clip_radius {float(group['clip_radius']):g}"
        lines.append(settings)
    backends = ", ".join(dict.fromkeys(ivon.backends.values()))
    weights = sum(param.numel() for param in trained)
    return (
        f"IVON: {' | '.join(dict.fromkeys(lines))}; backend {backends}; {weights:,} weights in {len(trained)} tensors"
    )


def say(line: str) -> None:
    """Log a line of information so that it is seen where nobody has set logging up, as the Trainer's own log is."""
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO)
    if not any(isinstance(handler, _ToStderr) for handler in _log.handlers):
        _log.addHandler(_ToStderr())
    _log.info(line)


class _ToStderr(logging.Handler):
    """For who has no handler of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in _log.handlers if handler is not self]
        if not others and not logging.getLogger().handlers:
            sys.stderr.write(f"{self.format(record)}\n")


class LossWatch:
    """Whether a run has fallen off: the loss has lost what it had gained, or is far above where it began, and stays so.

    Judged against the losses' own noise: 1.05 times the median difference of neighbours is a standard deviation of it.
    Losses around zero, as those of reinforcement learning, tell nothing.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._next = _FEWEST

    def note(self, loss: float) -> None:
        """Add a loss."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def fallen(self) -> str | None:
        """What has happened, or None. Long runs are looked at when they have grown by a twentieth."""
        count = len(self._losses)
        if count < self._next:
            return None
        self._next = count + max(1, count // 20)
        return _fallen(self._losses)


def _fallen(losses: Sequence[float]) -> str | None:
    width = max(3, len(losses) // 10)
    noise = 1.05 * statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
    first, last = statistics.fmean(losses[:width]), losses[-width:]
    margin = _SURELY * noise / math.sqrt(width) + _NOTICED * abs(first)
    now = statistics.fmean(last)
    if first <= _SURELY * noise:
        return None
    total, running = sum(losses[:width]), [first]
    for old, new in zip(losses, losses[width:], strict=False):
        total += new - old
        running.append(total / width)
    best = min(running)
    gained = first - best
    if gained > margin and now - best > 0.5 * gained + margin and min(last) > best + 0.25 * gained:
        return f"the loss had fallen from {first:.3g} to {best:.3g} and is back at {now:.3g}, so the run has fallen off"
    if now > 1.5 * first + margin and min(last) > first:
        return f"the loss began at {first:.3g} and has risen to {now:.3g}, so the run diverges"
    return None
