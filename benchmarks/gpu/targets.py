"""What was promised, held against what was measured.

Each target is the worst of its cases. A case of ours takes the faster backend, as `backend=None` does: the dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import traffic
from benchmarks.gpu.contenders import ADAMW, BASELINE, IVON_OPT
from benchmarks.gpu.measure import Comparison, Row
from benchmarks.gpu.workloads import DTYPES

LARGE, FLAT = 39_000_000, 400_000_000  # elements: "40M and above", "400M and 1B"
HOST_US = {128: 30.0, 450: 100.0}
HOST_SHARES = {"path": "addresses + arguments + launch", "step": "train() + step()"}
Cases = Iterable[tuple[str, float]]


@dataclass(frozen=True)
class Target:
    """A bound, and the case that is farthest from it."""

    name: str
    bound: float
    at_least: bool
    measured: float | None
    where: str

    @property
    def met(self) -> bool:
        """Whether it was measured and keeps the bound."""
        return self.measured is not None and self.margin >= 0

    @property
    def margin(self) -> float:
        """By how much of the bound it is kept (negative: missed)."""
        if self.measured is None:
            return 0.0
        return (self.measured / self.bound - 1) * (1 if self.at_least else -1)

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        return {**vars(self), "met": self.met, "margin": self.margin if self.measured is not None else None}


def target(name: str, bound: float, cases: Cases, *, at_least: bool = False) -> Target:
    """The worst of the cases against the bound; no cases: not measured."""
    worst = (min if at_least else max)(cases, key=lambda case: case[1], default=None)
    return Target(name, bound, at_least, worst[1] if worst else None, worst[0] if worst else "")


def _ours(comparison: Comparison, mode: str, value: Callable[[Row], float | None], best: Callable[..., Any]) -> Cases:
    """The faster backend's value on one workload, if any was measured."""
    found = [
        (f"{comparison.workload}, {comparison.dtype}, {row.backend}", figure)
        for row in comparison.rows
        if row.mode == mode and row.error is None and (figure := value(row)) is not None
    ]
    return [best(found, key=lambda case: case[1])] if found else []


def _wall_ratio(row: Row) -> float | None:
    return None if row.wall is None else row.wall.ratio


def _collect(comparisons: Iterable[Comparison], cases_of: Callable[[Comparison], Cases]) -> list[tuple[str, float]]:
    return [case for comparison in comparisons for case in cases_of(comparison)]


def _over_ivon_opt(comparison: Comparison) -> Cases:
    peer = next((row.wall for row in comparison.rows if row.name == IVON_OPT and row.error is None), None)
    if peer is None:
        return []
    return _ours(comparison, "plain", lambda row: None if row.wall is None else peer.p50 / row.wall.p50, max)


def _over_adamw_kernel(comparison: Comparison) -> Cases:
    if not any(row.name == BASELINE and row.error is None for row in comparison.rows):
        return []
    return _ours(comparison, "one launch", lambda row: None if row.kernel is None else row.kernel.ratio, min)


def _over_adamw_bytes(comparison: Comparison) -> Cases:
    """Our time over the time in which the copy moves fused AdamW's bytes."""
    moved = traffic.bytes_per_element(ADAMW, DTYPES[comparison.dtype]) * comparison.elements
    floor = moved / comparison.copy_bandwidth / 1e6
    return _ours(comparison, "one launch", lambda row: None if row.kernel is None else row.kernel.p50 / floor, min)


def step_targets(comparisons: list[Comparison]) -> list[Target]:
    """The targets of the optimizer's own time."""
    lora = [c for c in comparisons if c.workload.startswith("lora-")]
    many = [c for c in comparisons if c.tensors == 128]
    large = [c for c in comparisons if c.elements >= LARGE]
    huge = [c for c in comparisons if c.elements >= FLAT and c.dtype == "float32"]
    smallest = [c for c in comparisons if c.workload == "lora-r8-qv"]

    def wall(comparison: Comparison) -> Cases:
        return _ours(comparison, "plain", _wall_ratio, min)

    def share(comparison: Comparison) -> Cases:
        return _ours(comparison, "plain", lambda row: row.copy_share, max)

    def share_one(comparison: Comparison) -> Cases:
        return _ours(comparison, "one launch", lambda row: row.copy_share, max)

    ours = "one launch / fused AdamW, float32, 400M and 1B"
    return [
        target("40M and above: bandwidth / copy, sample + step", 0.88, _collect(large, share), at_least=True),
        target("40M and above: bandwidth / copy, one launch", 0.88, _collect(large, share_one), at_least=True),
        target("LoRA: wall time sample + step / fused AdamW", 1.2, _collect(lora, wall)),
        target("128 tensors: wall time sample + step / fused AdamW", 1.0, _collect(many, wall)),
        target("4.2M: wall time ivon-opt / sample + step", 20.0, _collect(smallest, _over_ivon_opt), at_least=True),
        target(f"{ours}: kernel time", 1.15, _collect(huge, _over_adamw_kernel)),
        target(f"{ours}: its bytes at the copy's speed", 1.15, _collect(huge, _over_adamw_bytes)),
    ]


def model_targets(record: dict[str, Any] | None) -> list[Target]:
    """The targets of the whole training step, in the default mode."""
    rows = [r for r in (record or {}).get("rows", ()) if r["mode"] == "plain" and not r["error"]]
    fastest = min((r for r in rows if r["ratio"] is not None), key=lambda r: r["ratio"], default=None)
    time = [(fastest["name"], fastest["ratio"])] if fastest else []
    memory = [(fastest["name"], fastest["extra_bytes_per_element"])] if fastest else []
    return [
        target("7B LoRA training step: IVON / fused AdamW", 1.01, time),
        target("7B LoRA training step: peak bytes over AdamW's per LoRA element", 16.0, memory),
    ]


def host_targets(record: dict[str, Any] | None) -> list[Target]:
    """The targets of the host's share: of the native path alone, and of train() and step() as a whole."""
    rows = [r for r in (record or {}).get("rows", ()) if not r["error"]]
    return [
        target(
            f"{count} tensors: microseconds of the host, {what}, {state} gradients",
            bound,
            [(r["name"], r[state]["both"]["p50"]) for r in rows if r["tensors"] == count and r["share"] == share],
        )
        for share, what in HOST_SHARES.items()
        for count, bound in HOST_US.items()
        for state in ("same", "fresh")
    ]
