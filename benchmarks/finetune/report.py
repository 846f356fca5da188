"""What a run leaves behind: the table and `results.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.finetune.evaluate import Scores
from ivon_kernels.predict.metrics import Reliability

PACKAGES = ("torch", "transformers", "peft", "torchmetrics", "scikit-learn", "numpy", "ivon-kernels")


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
