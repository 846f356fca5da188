"""The logic of the speed benchmark's targets, and which backend was the faster one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.speed import host
from benchmarks.speed.clock import KERNEL
from benchmarks.speed.contender import BASELINE, IVON_OPT, STEP
from benchmarks.speed.model import WHOLE
from benchmarks.speed.peers import ONE_LAUNCH, PLAIN, our_name
from benchmarks.speed.record import Measurement, Record
from benchmarks.speed.report import dispatch_table
from benchmarks.speed.steps import GROWTH, STATE
from benchmarks.speed.targets import Target, judge, targets

LORA = {"title": "Llama-2-7B, LoRA r=8 on q, v", "tensors": 128, "elements": 4_194_304}
CUDA, TRITON, CPU = (our_name(name, PLAIN) for name in ("cuda", "triton", "cpu"))
ONE = our_name("cuda", ONE_LAUNCH)


def row(workload: str, name: str, ms: float, base: float | None = None, **further: Any) -> Measurement:
    given: dict[str, Any] = {"part": "steps", "dtype": "float32", "quantity": STEP, "unit": "ms", **further}
    ratio = None if base is None else ms / base
    return Measurement(
        workload=workload, contender=name, ours="ivon_kernels" in name, p20=ms, p50=ms, p80=ms, ratio=ratio, **given
    )


def found(kind: str, workloads: dict[str, Any], *rows: Measurement) -> dict[str, SimpleNamespace]:
    record = Record(device={"kind": kind}, workloads=workloads, measurements=list(rows))
    return {t["name"]: SimpleNamespace(**t) for t in targets(record)}


def test_target_takes_the_worst_case_and_says_by_how_much() -> None:
    low = SimpleNamespace(**judge(Target("at most", "", 1.2), {"a": 1.0, "b": 1.5}))
    assert (low.measured, low.where, low.met, low.verdict) == (1.5, "b", False, "missed by 25.0%")
    assert low.margin == pytest.approx(-0.25)
    high = SimpleNamespace(**judge(Target("at least", "", 0.88, at_least=True), {"a": 0.95, "b": 0.90}))
    assert (high.measured, high.where, high.met, high.verdict) == (0.90, "b", True, "met by 2.3%")
    nothing = SimpleNamespace(**judge(Target("not measured", "", 1.0), {}))
    assert nothing.measured is None and not nothing.met and nothing.verdict == "not measured"
    assert nothing.margin is None


def test_targets_of_the_cpu() -> None:
    flats = {f"flat-{n}": {"title": "one tensor", "tensors": 1, "elements": n} for n in (10**6, 10**7, 10**8)}
    times = found(
        "cpu",
        {"llama-2-7b-r8-qv": LORA, **flats},
        row("llama-2-7b-r8-qv", CPU, 6.0, 2.0),
        row("llama-2-7b-r8-qv", IVON_OPT, 90.0, 2.0),
        *(row(name, CPU, info["elements"] ** 1.1) for name, info in flats.items()),
        row("flat-10M", CPU, 16.0, quantity=STATE),
        row("flat-10M", CPU, 2.0**21, quantity=GROWTH),
    )
    assert times["CPU, Llama-2-7B r=8: ivon-opt / sample + step"].measured == pytest.approx(15.0)
    assert times["CPU, Llama-2-7B r=8: sample + step / fused AdamW"].verdict == "met by 0.0%"
    assert times["CPU, 128 tensors of 16x64: sample + step / fused AdamW"].measured is None
    scaling = times["CPU: time of one tensor against that of a tenth of it"]
    assert (
        scaling.measured == pytest.approx(10**1.1) and scaling.where == "flat-100000000, float32"
    )  # 10M's tenth is in the caches
    assert times["CPU: bytes of state per float32 element"].met
    assert times["CPU: growth of the resident set in a step, MiB"].measured == 2.0
    assert times["GPU, LoRA: wall time sample + step / fused AdamW"].measured is None


def test_step_targets_take_the_faster_backend() -> None:
    rows = (row("llama-2-7b-r8-qv", name, ms, 0.1) for name, ms in ((TRITON, 0.09), (CUDA, 0.08), (IVON_OPT, 2.0)))
    times = found("cuda", {"llama-2-7b-r8-qv": LORA}, *rows)
    wall = times["GPU, LoRA: wall time sample + step / fused AdamW"]
    assert wall.measured == pytest.approx(0.8) and wall.where == "llama-2-7b-r8-qv, float32, cuda"
    assert times["GPU, 128 tensors: wall time sample + step / fused AdamW"].met
    assert times["GPU, Llama-2-7B r=8: wall time ivon-opt / sample + step"].measured == pytest.approx(25.0)
    assert times["GPU, 40M and above: bandwidth / copy, one launch"].measured is None
    assert times["CPU, Llama-2-7B r=8: sample + step / fused AdamW"].measured is None


def test_one_launch_is_held_against_adamw_and_against_its_bytes() -> None:
    flat = {"flat-100M": {"title": "one tensor", "tensors": 1, "elements": 100_000_000}}
    moved = {"quantity": KERNEL, "bytes_per_element": 36, "gbps": 3000.0, "copy_share": 1.0}
    times = found("cuda", flat, row("flat-100M", ONE, 1.2, 1.0, **moved))
    ours = "GPU, one launch / fused AdamW, float32, 100M and 1B"
    assert times[f"{ours}: kernel time"].measured == pytest.approx(1.2)
    # 28 bytes * 100M / 3000 GB/s = 0.933 ms; 36 bytes * 100M / 1.2 ms = 3000 GB/s
    assert times[f"{ours}: its bytes at the copy's speed"].measured == pytest.approx(1.2 / 0.9333, rel=1e-3)
    assert times["GPU, 40M and above: bandwidth / copy, one launch"].measured == pytest.approx(1.0)


def test_rows_that_failed_do_not_count() -> None:
    failed = row("llama-2-7b-r8-qv", CUDA, 1.0, 1.0, error="no device")
    assert all(t.measured is None for t in found("cuda", {"llama-2-7b-r8-qv": LORA}, failed).values())


def test_model_and_host_targets() -> None:
    def step(name: str, ms: float, peak: float) -> Measurement:
        further = {"part": "model", "quantity": WHOLE, "peak_bytes_per_element": peak}
        return row("llama", name, ms, 100.0, **further)

    rows = (step(BASELINE, 100.0, 50.0), step(TRITON, 102.0, 54.0), step(CUDA, 100.5, 55.0))
    hosts = (
        row("128-tiny", host.WHOLE, us, quantity=q, unit="us") for q, us in ((host.SAME, 27.0), (host.FRESH, 33.0))
    )
    times = found("cuda", {}, *rows, *hosts)
    time = times["GPU, 7B LoRA training step: IVON / fused AdamW"]
    memory = times["GPU, 7B LoRA training step: peak bytes over AdamW's per LoRA element"]
    assert (time.measured, time.met, memory.measured, memory.met) == (1.005, True, 5.0, True)
    same, fresh = (times[f"host, 128 tensors: us of train() + step(), {s} gradients"] for s in ("same", "fresh"))
    assert (same.measured, same.met, fresh.measured, fresh.met) == (27.0, True, 33.0, False)
    assert fresh.margin == pytest.approx(-0.1)
    assert sum(name.startswith("host, ") for name in times) == 8  # path or whole, 128 or 450 tensors, same or fresh


def test_dispatch_names_the_faster_backend() -> None:
    rows = [row("128-tiny", TRITON, 0.09), row("128-tiny", CUDA, 0.06), row("450-tiny", CUDA, 0.2)]
    ((workload, _, _, backend, slower),) = dispatch_table(Record(device={}, measurements=rows).measured()).to_numpy()
    assert (workload, backend, slower) == ("128-tiny", "cuda", "50%")
