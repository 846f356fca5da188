"""A run of the speed benchmark under way, for tests of its parts."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.speed.clock import CpuClock
from benchmarks.speed.measure import Budget, Options, Session
from benchmarks.speed.record import Record


def session(clock: CpuClock, *, seconds: float = 600.0, **options: Any) -> Session:
    """With these options; nothing is written."""
    defaults = {"rounds": 2, "turn_ms": 1.0, "max_elements": 10**9, "quick": False, "compiling": False}
    chosen = Options(clock.kind, 1, seconds=seconds, **{**defaults, **options})
    return Session(Record(device={}), clock, chosen, Budget(seconds), Console(), save=lambda part: None)
