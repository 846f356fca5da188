"""What was promised, held against what was measured.

Each target is the worst of its cases. On a GPU a case of ours takes the faster backend, as `backend=None` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.speed import host, memory, traffic
from benchmarks.speed.clock import KERNEL
from benchmarks.speed.contenders import BASELINE, IVON_OPT, STEP
from benchmarks.speed.ours import ONE_LAUNCH, PLAIN, our_name
from benchmarks.speed.record import Measurement, Record
from benchmarks.speed.workloads import DTYPES, short

LARGE, FLAT, SCALING = 39_000_000, 100_000_000, 4_000_000  # elements
MODEL_QUANTITY = "whole step"
_MEGABYTE = 2**20
_GPU = ("cuda", "triton")
_HOST = ((host.PATH, "addresses + arguments + launch"), (host.WHOLE, "train() + step()"))
_HOST_US = {128: 30.0, 450: 100.0}
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
        return round((self.measured / self.bound - 1) * (1 if self.at_least else -1), 4)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.measured is None:
            return "not measured"
        return f"{'met' if self.met else 'missed'} by {abs(self.margin):.1%}"

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        margin = self.margin if self.measured is not None else None
        return {**vars(self), "met": self.met, "margin": margin, "verdict": self.verdict}


def target(name: str, bound: float, cases: Cases, *, at_least: bool = False) -> Target:
    """The worst of the cases against the bound; no cases: not measured."""
    worst = (min if at_least else max)(cases, key=lambda case: case[1], default=None)
    return Target(name, bound, at_least, worst[1] if worst else None, worst[0] if worst else "")


def targets(record: Record) -> list[Target]:
    """All of them: those of the other kind of device are not measured."""
    on_gpu = record.device.get("kind") == "cuda"
    nothing = Record(device={})
    gpu, cpu = (record, nothing) if on_gpu else (nothing, record)
    return [*cpu_targets(cpu), *gpu_targets(gpu), *model_targets(gpu), *host_targets(record)]


# ---- the processor ---------------------------------------------------------------------------------------------------


def cpu_targets(record: Record) -> list[Target]:
    """The cpu backend, in float32."""
    ours, one_pass = our_name("cpu", PLAIN), our_name("cpu", ONE_LAUNCH)

    def ratio(workload: str, name: str, to: str | None = None) -> Cases:
        own = record.find(workload, "float32", name, STEP)
        other = None if to is None else record.find(workload, "float32", to, STEP)
        if own is None or own.ratio is None or (to is not None and (other is None or not other.ratio)):
            return []
        return [(f"{workload}, float32", own.ratio / (other.ratio or 1.0 if other is not None else 1.0))]

    def value(quantity: str, unit: float = 1.0) -> Cases:
        return [
            (m.workload, m.p50 / unit)
            for m in record.measurements
            if (m.contender, m.quantity) == (ours, quantity) and m.p50 is not None
        ]

    llama = "llama-2-7b-r8-qv"
    return [
        target("CPU, Llama-2-7B r=8: ivon-opt / sample + step", 10.0, ratio(llama, IVON_OPT, ours), at_least=True),
        target("CPU, Llama-2-7B r=8: sample + step / fused AdamW", 3.0, ratio(llama, ours)),
        target("CPU, Llama-2-7B r=8: one pass / fused AdamW", 2.3, ratio(llama, one_pass)),
        *(
            target(f"CPU, {count} tensors of 16x64: sample + step / fused AdamW", 0.7, ratio(f"{count}-tiny", ours))
            for count in (128, 450)
        ),
        target("CPU: bytes of state per float32 element", 16.0, value(memory.STATE)),
        target("CPU: growth of the resident set in a step, MiB", 1.0, value(memory.GROWTH, _MEGABYTE)),
        target("CPU: time of one tensor against that of a tenth of it", 11.0, _scaling(record, ours)),
    ]


def _scaling(record: Record, name: str) -> Cases:
    """Time of a flat tensor over that of one with a tenth of its elements (large enough to be in memory both)."""
    times = {
        info["elements"]: m.p50
        for workload, info in record.workloads.items()
        if info["tensors"] == 1 and (m := record.find(workload, "float32", name, STEP)) and m.p50
    }
    return [
        (short(elements), time / times[elements // 10])
        for elements, time in times.items()
        if elements // 10 in times and elements // 10 >= SCALING
    ]


# ---- the GPU ---------------------------------------------------------------------------------------------------------


def gpu_targets(record: Record) -> list[Target]:
    """The GPU backends' own time."""
    pairs = [(workload, dtype) for workload, dtype in record.pairs() if workload in record.workloads]

    def collect(
        wanted: Callable[[dict[str, Any], str], bool],
        mode: str,
        quantity: str,
        value: Callable[[Measurement], float | None],
        best: Callable[..., Any] = min,
    ) -> list[tuple[str, float]]:
        found = []
        for workload, dtype in pairs:
            if wanted(record.workloads[workload], dtype):
                rows = {name: record.find(workload, dtype, our_name(name, mode), quantity) for name in _GPU}
                cases = [
                    (f"{workload}, {dtype}, {name}", figure)
                    for name, row in rows.items()
                    if row is not None and (figure := value(row)) is not None
                ]
                found += [best(cases, key=lambda case: case[1])] if cases else []
        return found

    def over_ivon_opt(row: Measurement) -> float | None:
        peer = record.find(row.workload, row.dtype, IVON_OPT, STEP)
        return None if peer is None or peer.p50 is None or row.p50 is None else peer.p50 / row.p50

    def over_adamw_bytes(row: Measurement) -> float | None:
        """Our time over the time in which the copy moves fused AdamW's bytes."""
        moved = traffic.bytes_per_element(("adamw",), DTYPES[row.dtype])
        if row.gbps is None or row.bytes_per_element is None or not row.copy_share:
            return None
        return row.bytes_per_element / moved / row.copy_share

    def large(info: dict[str, Any], _: str) -> bool:
        return bool(info["elements"] >= LARGE)

    def huge(info: dict[str, Any], dtype: str) -> bool:
        return bool(info["elements"] >= FLAT) and info["tensors"] == 1 and dtype == "float32"

    def lora(info: dict[str, Any], _: str) -> bool:
        return "Llama-2-7B" in info["title"]

    def many(info: dict[str, Any], _: str) -> bool:
        return bool(info["tensors"] == 128)

    def smallest(info: dict[str, Any], _: str) -> bool:
        return lora(info, _) and many(info, _)

    def share(row: Measurement) -> float | None:
        return row.copy_share

    def ratio(row: Measurement) -> float | None:
        return row.ratio

    shares = [
        target(
            f"GPU, 40M and above: bandwidth / copy, {what}",
            0.88,
            collect(large, mode, KERNEL, share, max),
            at_least=True,
        )
        for what, mode in (("sample + step", PLAIN), ("one launch", ONE_LAUNCH))
    ]
    one = "GPU, one launch / fused AdamW, float32, 100M and 1B"
    opt = "GPU, Llama-2-7B r=8: wall time ivon-opt / sample + step"
    return [
        *shares,
        target("GPU, LoRA: wall time sample + step / fused AdamW", 1.2, collect(lora, PLAIN, STEP, ratio)),
        target("GPU, 128 tensors: wall time sample + step / fused AdamW", 1.0, collect(many, PLAIN, STEP, ratio)),
        target(opt, 20.0, collect(smallest, PLAIN, STEP, over_ivon_opt, max), at_least=True),
        target(f"{one}: kernel time", 1.15, collect(huge, ONE_LAUNCH, KERNEL, ratio)),
        target(f"{one}: its bytes at the copy's speed", 1.15, collect(huge, ONE_LAUNCH, KERNEL, over_adamw_bytes)),
    ]


def model_targets(record: Record) -> list[Target]:
    """The targets of the whole training step, in the default mode, with the faster backend."""
    rows = [m for m in record.measurements if m.quantity == MODEL_QUANTITY and m.error is None]
    base = next((m for m in rows if m.contender == BASELINE), None)
    ours = [m for m in rows if m.ours and m.contender.endswith(PLAIN) and m.ratio is not None]
    fastest = min(ours, key=lambda m: m.ratio or 0.0, default=None)
    time: Cases = [(fastest.contender, fastest.ratio)] if fastest is not None and fastest.ratio is not None else []
    extra: Cases = []
    if fastest is not None and base is not None and fastest.peak_bytes_per_element and base.peak_bytes_per_element:
        extra = [(fastest.contender, fastest.peak_bytes_per_element - base.peak_bytes_per_element)]
    return [
        target("GPU, 7B LoRA training step: IVON / fused AdamW", 1.01, time),
        target("GPU, 7B LoRA training step: peak bytes over AdamW's per LoRA element", 16.0, extra),
    ]


# ---- the host --------------------------------------------------------------------------------------------------------


def host_targets(record: Record) -> list[Target]:
    """The host's share: of the native path alone, and of train() and step() as a whole."""
    found = []
    for contender, what in _HOST:
        for count, bound in _HOST_US.items():
            for quantity, state in ((host.SAME, "same"), (host.FRESH, "fresh")):
                row = record.find(f"{count}-tiny", "float32", contender, quantity)
                cases = [(row.workload, row.p50)] if row is not None and row.p50 is not None else []
                found.append(target(f"host, {count} tensors: us of {what}, {state} gradients", bound, cases))
    return found


def dispatch_table(record: Record) -> list[dict[str, Any]]:
    """Which of our backends was the faster one, by wall time: what `backend=None` should take.

    Returns:
        One row per workload, dtype and mode that several backends were measured on: `backend`, the fastest; `margin`,
        the slowest's time over its.
    """
    table = []
    for workload, dtype in record.pairs():
        for mode in (PLAIN, ONE_LAUNCH):
            rows = {name: record.find(workload, dtype, our_name(name, mode), STEP) for name in ("cpu", *_GPU)}
            wall = {name: row.p50 for name, row in rows.items() if row is not None and row.p50 is not None}
            if len(wall) > 1:
                fastest = min(wall, key=wall.__getitem__)
                margin = max(wall.values()) / wall[fastest]
                row = {"workload": workload, "dtype": dtype, "mode": mode, "backend": fastest, "margin": margin}
                table.append(row)
    return table
