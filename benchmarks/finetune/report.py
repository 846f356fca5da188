"""Scores as a record holds them, and their tables: one source for the terminal and for the documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isnan
from typing import Any

import pandas as pd

from benchmarks.tables import NOTHING
from ivon_kernels.predict import metrics

PACKAGES = ("torch", "transformers", "peft", "torchmetrics", "scikit-learn", "numpy", "ivon-kernels")
# What every table has: the fields of `ivon_kernels.predict.metrics.Scores`, and their heads.
SCORES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier"}
OF_POSTERIORS = {**SCORES, "auroc_errors": "AUROC", "vote_cross_entropy": "votes"}
Row = Mapping[str, Any]  # one way of predicting in a record: its `name`, its `scores`, and more
Domain = Mapping[str, Any]  # `rows` of an evaluation, with their `task`, whether under `shift`, how many `examples`


def scores_record(scores: metrics.Scores) -> dict[str, float | None]:
    """Scores as JSON can hold them: nan, where there is no score, is null."""
    return {name: None if value is None or isnan(value) else value for name, value in asdict(scores).items()}


def table(rows: Sequence[Row], heads: Mapping[str, str]) -> pd.DataFrame:
    """Scores as text, by the rows' names; a column is left out where no row has the score."""
    frame = pd.DataFrame([row["scores"] for row in rows], [row["name"] for row in rows], dtype=float)
    frame = frame.reindex(columns=list(heads)).dropna(axis=1, how="all").rename(columns=heads)
    return frame.map("{:.3f}".format, na_action="ignore").fillna(NOTHING)


def place(domain: Domain) -> str:
    """Which sentences these are, and whether the adapter was trained on others."""
    return f"{domain['task']}, {'under shift' if domain['shift'] else 'in distribution'}"


def table_of_domains(domains: Sequence[Domain]) -> pd.DataFrame:
    """The scores of an evaluation as text, by domain and way of predicting."""
    return pd.concat({place(domain): table(domain["rows"], OF_POSTERIORS) for domain in domains}).fillna(NOTHING)


def standard_error(rows: Iterable[Row], examples: int) -> float:
    """The largest standard error of the rows' accuracies."""
    return max(float((a * (1 - a) / examples) ** 0.5) for a in (row["scores"]["accuracy"] for row in rows))
