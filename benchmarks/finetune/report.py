"""What a run leaves behind: the table, `results.json` and the reliability diagram."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.finetune.evaluate import BINS, Reliability, Scores

PACKAGES = ("torch", "transformers", "peft", "torchmetrics", "scikit-learn", "numpy", "ivon-kernels")
COLORS = {"AdamW": "#4c72b0", "IVON, mean": "#dd8452"}
SAMPLES_COLOR = "#55a868"


@dataclass(frozen=True)
class Row:
    """One way of predicting, judged."""

    name: str
    optimizer: str
    scores: Scores
    reliability: Reliability
    train_seconds: float
    optimizer_ms: float


def print_table(console: Console, rows: list[Row], *, title: str, examples: int) -> None:
    """Prints the one table of the main job."""
    rated = all(row.scores.rater_kl is not None for row in rows)
    headers = ["accuracy", "NLL", "ECE", "Brier", *(["raters"] if rated else []), "training", "opt./step"]
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        s = row.scores
        values = [s.accuracy, s.nll, s.ece, s.brier, *([s.rater_kl] if s.rater_kl is not None else [])]
        times = [f"{row.train_seconds:.1f} s", f"{row.optimizer_ms:.2f} ms"]
        table.add_row(row.name, *(f"{value:.3f}" for value in values), *times)
    console.print(table)
    error = max((row.scores.accuracy * (1 - row.scores.accuracy) / examples) ** 0.5 for row in rows)
    console.print(f"{examples} test examples: one standard error of the accuracy is {error:.3f}.")
    if rated:
        console.print("raters: KL divergence of the predictions from the raters' votes, in nats.")


def write_results(path: Path, results: dict[str, Any], rows: list[Row]) -> None:
    """Writes `results.json`: `results`, one entry per row, and what the run ran on."""
    content = {**results, "rows": [asdict(row) for row in rows], "environment": environment(PACKAGES)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw_reliability(path: Path, rows: list[Row], *, title: str) -> None:
    """Draws, for every row, accuracy against confidence, and how many examples have that confidence."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2,
        len(rows),
        figsize=(3.4 * len(rows) + 0.6, 5.0),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(3.2, 1),
    )
    figure.set_layout_engine("constrained", wspace=0.05)
    for row, upper, lower in zip(rows, axes[0], axes[1], strict=True):
        color = COLORS.get(row.name, SAMPLES_COLOR)
        _draw_row(row, upper, lower, color)
    axes[0][0].set_ylabel("accuracy")
    axes[1][0].set_ylabel("test examples")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_row(row: Row, upper: Any, lower: Any, color: str) -> None:
    points = row.reliability
    filled = [count for count in points.counts if count]
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    upper.vlines(points.confidence, points.accuracy, points.confidence, color=color, alpha=0.35, linewidth=4)
    upper.plot(points.confidence, points.accuracy, color=color, linewidth=1.5)
    upper.scatter(
        points.confidence,
        points.accuracy,
        s=12 + 160 * np.sqrt(filled) / np.sqrt(sum(filled)),
        color=color,
        clip_on=False,
    )
    upper.set(title=row.name, xlim=(0, 1), ylim=(0, 1), xticks=np.linspace(0, 1, 6))
    text = f"accuracy {row.scores.accuracy:.3f}\nECE {row.scores.ece:.3f}\nNLL {row.scores.nll:.3f}"
    upper.text(0.04, 0.96, text, transform=upper.transAxes, va="top", fontsize=9)
    upper.grid(alpha=0.25)
    edges = np.linspace(0, 1, BINS + 1)
    lower.bar(edges[:-1], points.counts, width=1 / BINS, align="edge", color=color, edgecolor="white")
    lower.set(xlabel="confidence")
    lower.grid(axis="y", alpha=0.25)
