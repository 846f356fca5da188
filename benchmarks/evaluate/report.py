"""The tables of an evaluation, from the domains of its record, and the picture of its dials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.finetune import report
from benchmarks.tables import NOTHING, show
from ivon_kernels.posterior import Sweep

HEADS = {**report.SCORES, "auroc_errors": "AUROC", "vote_cross_entropy": "votes"}

Domain = Mapping[str, Any]
"""One domain in a record: its `task`, whether it is under `shift`, `examples`, `vote_entropy` and `rows`."""


def place(domain: Domain) -> str:
    """Which sentences these are, and whether the adapter was trained on others."""
    return f"{domain['task']}, {'under shift' if domain['shift'] else 'in distribution'}"


def title(domain: Domain) -> str:
    """What a table or page is about."""
    return f"{place(domain)}, {domain['examples']} examples"


def table(domains: Sequence[Domain]) -> pd.DataFrame:
    """The scores as text, by domain and way of predicting."""
    return pd.concat({place(domain): report.table(domain["rows"], HEADS) for domain in domains}).fillna(NOTHING)


def print_domain(console: Console, domain: Domain) -> None:
    """One domain's table."""
    frame = report.table(domain["rows"], HEADS)
    if domain["vote_entropy"] is not None:
        frame.loc["votes' own entropy"] = {"votes": f"{domain['vote_entropy']:.3f}"}
    show(console, title(domain), frame.fillna(""))


def print_legend(console: Console, domains: Sequence[Domain]) -> None:
    """What the columns are, and how far chance alone moves the accuracy."""
    error = max(report.standard_error(domain["rows"], domain["examples"]) for domain in domains)
    console.print(f"One standard error of an accuracy is up to {error:.3f}.")
    console.print("AUROC: does confidence tell right from wrong answers; 0.5 is not at all.")
    if any(domain["vote_entropy"] is not None for domain in domains):
        console.print("votes: cross-entropy of the predictions to the raters' votes, in nats.")


def print_dials(console: Console, sweeps: Sequence[Sweep], examples: int) -> None:
    """What was chosen, of what."""
    for sweep in sweeps:
        tried = ", ".join(f"{value:g}" for value in sweep.values)
        chosen = f"{sweep.dial} {sweep.best:g}: the best NLL on {examples} validation examples, of {tried}"
        console.print(chosen, soft_wrap=True)


def draw_dials(path: Path, sweeps: Sequence[Sweep]) -> None:
    """Writes a PNG with accuracy against calibration error at every position of each dial."""
    figure = Figure(figsize=(4.6 * len(sweeps), 3.8), layout="constrained")
    for sweep, ax in zip(sweeps, figure.subplots(1, len(sweeps), squeeze=False)[0], strict=True):
        sweep.plot(ax).set_title(f"{sweep.dial}, validation split")
    figure.savefig(path, dpi=150)


def dial_record(sweep: Sweep) -> dict[str, Any]:
    """A dial as JSON can hold it."""
    about = {name: getattr(sweep, name) for name in ("dial", "best", "criterion", "values")}
    return {**about, "scores": [report.scores_record(scores) for scores in sweep.scores]}
