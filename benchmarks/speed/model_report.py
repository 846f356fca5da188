"""The whole finetuning step as a table and as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.speed.contenders import BASELINE
from benchmarks.speed.model import OPTIMIZER, PASSES, WHOLE, shares
from benchmarks.speed.plots import BASELINE_COLOR, OUR_COLOR, PEER_COLOR
from benchmarks.speed.record import Measurement
from benchmarks.speed.tables import Grid


def _by_quantity(measurements: Sequence[Measurement], quantity: str) -> dict[str, Measurement]:
    return {m.contender: m for m in measurements if m.quantity == quantity and m.error is None}


def grid(measurements: Sequence[Measurement]) -> Grid:
    """One row for each optimizer: the step, its two parts, the optimizer's share, the ratios to AdamW, and memory."""
    wholes, passes, parts = (_by_quantity(measurements, quantity) for quantity in (WHOLE, PASSES, OPTIMIZER))
    share = shares(measurements)

    def times(m: Measurement) -> str:
        return " ".join(
            f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in (m.p20 or 0.0, m.p50 or 0.0, m.p80 or 0.0)
        )

    def ratio(m: Measurement, form: str) -> str:
        return "-" if m.ratio is None else format(m.ratio, form)

    rows = [
        (
            *(name, times(whole), times(passes[name]), times(parts[name]), f"{share[name]:.2%}"),
            *(ratio(whole, ".4f"), ratio(parts[name], ".2f")),
            "-" if whole.peak_bytes_per_element is None else f"{whole.peak_bytes_per_element:.1f}",
        )
        for name, whole in wholes.items()
    ]
    headers = ("p20 p50 p80 ms", WHOLE, PASSES, OPTIMIZER, "share", "x AdamW", "its optimizer", "peak B/LoRA element")
    title = f"{measurements[0].workload}, LoRA in {measurements[0].dtype}" if rows else ""
    return Grid(title, headers, rows)


def plot(path: Path, measurements: Sequence[Measurement]) -> None:
    """The whole step in its two parts, and the optimizer alone with its share of the step."""
    passes, parts = (_by_quantity(measurements, quantity) for quantity in (PASSES, OPTIMIZER))
    names = [name for name in parts if name in passes]
    if not names:
        return
    colors = [BASELINE_COLOR if name == BASELINE else OUR_COLOR if parts[name].ours else PEER_COLOR for name in names]
    share = shares(measurements)
    alone = [parts[name].p50 or 0.0 for name in names]
    before = [passes[name].p50 or 0.0 for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * len(names) + 1.6), layout="constrained", sharey=True)
    left.barh(names, before, color="#dfe3e8", label=PASSES)
    left.barh(names, alone, left=before, color=colors)
    left.set_xlabel("ms of one step (grey: forward and backward pass)", fontsize=8)
    bars = right.barh(names, alone, color=colors)
    labels = [f"{ms:.3g} ms, {share[name]:.2%} of the step" for ms, name in zip(alone, names, strict=True)]
    right.bar_label(bars, labels, padding=3, fontsize=8)
    right.set_xlim(0, 1.6 * max(alone))
    right.set_xlabel("ms of the optimizer", fontsize=8)
    left.invert_yaxis()
    figure.suptitle(measurements[0].workload, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
