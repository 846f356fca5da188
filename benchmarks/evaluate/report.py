"""What an evaluation leaves behind: tables, the record, and pages with pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.finetune.report import PACKAGES
from ivon_kernels.posterior.sweeps import Sweep
from ivon_kernels.predict import metrics
from ivon_kernels.predict.prediction import Prediction

COLUMNS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier", "auroc_errors": "AUROC"}
VOTES = {"vote_cross_entropy": "votes"}


@dataclass(frozen=True)
class Domain:
    """The predictions for one domain, judged."""

    task: str
    shift: bool
    """Whether the adapter was trained on another domain."""
    predictions: Mapping[str, Prediction]
    labels: Tensor
    votes: Tensor | None

    @property
    def title(self) -> str:
        """What a table or page is about."""
        place = "under shift" if self.shift else "in distribution"
        return f"{self.task}, {place}, {len(self.labels)} examples"

    @property
    def scores(self) -> dict[str, metrics.Scores]:
        """The scores by prediction."""
        return {
            name: metrics.evaluate(p.probabilities, self.labels, self.votes) for name, p in self.predictions.items()
        }

    def record(self) -> dict[str, Any]:
        """The scores as JSON can hold them."""
        rows = [
            {
                "name": name,
                "scores": _record(scores),
                "mutual_information": self.predictions[name].mutual_information.mean().item(),
            }
            for name, scores in self.scores.items()
        ]
        floor = None if self.votes is None else metrics.vote_entropy(self.votes)
        return {
            "task": self.task,
            "shift": self.shift,
            "examples": len(self.labels),
            "vote_entropy": floor,
            "rows": rows,
        }


def print_domain(console: Console, domain: Domain) -> None:
    """One domain's table."""
    columns = {**COLUMNS, **({} if domain.votes is None else VOTES)}
    table = Table(title=domain.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for header in columns.values():
        table.add_column(header, justify="right", no_wrap=True)
    for name, scores in domain.scores.items():
        table.add_row(name, *(f"{getattr(scores, field):.3f}" for field in columns))
    if domain.votes is not None:
        table.add_row("votes' own entropy", *[""] * len(COLUMNS), f"{metrics.vote_entropy(domain.votes):.3f}")
    console.print(table)


def print_legend(console: Console, domains: list[Domain]) -> None:
    """What the columns are, and how far chance alone moves the accuracy."""
    error = max(
        (scores.accuracy * (1 - scores.accuracy) / len(domain.labels)) ** 0.5
        for domain in domains
        for scores in domain.scores.values()
    )
    console.print(f"One standard error of an accuracy is up to {error:.3f}.")
    console.print("AUROC: does confidence tell right from wrong answers; 0.5 is not at all.")
    if any(domain.votes is not None for domain in domains):
        console.print("votes: cross-entropy of the predictions to the raters' votes, in nats.")


def print_dials(console: Console, sweeps: list[Sweep], examples: int) -> None:
    """What was chosen, of what."""
    for sweep in sweeps:
        tried = ", ".join(f"{value:g}" for value in sweep.values)
        console.print(
            f"{sweep.dial} {sweep.best:g}: the best NLL on {examples} validation examples, of {tried}", soft_wrap=True
        )


def draw_dials(path: Path, sweeps: list[Sweep]) -> None:
    """Writes a PNG with accuracy against calibration error at every position of each dial."""
    figure = Figure(figsize=(4.6 * len(sweeps), 3.8), layout="constrained")
    for sweep, ax in zip(sweeps, figure.subplots(1, len(sweeps), squeeze=False)[0], strict=True):
        sweep.plot(ax).set_title(f"{sweep.dial}, validation split")
    figure.savefig(path, dpi=150)


def write_record(path: Path, record: dict[str, Any], sweeps: list[Sweep], domains: list[Domain]) -> None:
    """Writes the record, with what the evaluation ran on."""
    dials = [
        {
            "dial": sweep.dial,
            "best": sweep.best,
            "criterion": sweep.criterion,
            "values": sweep.values,
            "scores": [_record(scores) for scores in sweep.scores],
        }
        for sweep in sweeps
    ]
    content = {
        **record,
        "dials": dials,
        "domains": [domain.record() for domain in domains],
        "environment": environment(PACKAGES),
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _record(scores: metrics.Scores) -> dict[str, float | None]:
    """Scores as JSON can hold them: nan, where there is no score, is null."""
    return {field: None if value is None or isnan(value) else value for field, value in asdict(scores).items()}
