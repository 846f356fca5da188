"""The record of a study that reports several numbers of passes, and the same as the report reads it.

A cell of the record is a task, a method and a seed; its rows are averages over so many samples, without and with a
temperature. The report takes every row for a method of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.summary import METRICS

SCHEMA = 2  # of the record; 1 is that of a study with one row for each cell
DIGITS = 5
_KEPT = ("extra_parameters", "passes", "predict_ms_per_example", "train_seconds", "fit_seconds", "tune_seconds")

Content = dict[str, Any]


@dataclass(frozen=True, order=True)
class Row:
    """A way to predict: a method, of whose samples so many are averaged, and whether a temperature divides the logs."""

    method: str
    samples: int
    scaled: bool

    def name(self, sampling: bool) -> str:
        """The name that it has as a method of its own; the method's own where there is nothing to say."""
        return self.method + (f"@{self.samples}" if sampling else "") + ("+T" if self.scaled else "")

    def title(self, title: str, sampling: bool) -> str:
        """What tables call it."""
        passes = f", {self.samples} pass{'es' if self.samples > 1 else ''}" if sampling else ""
        return f"{title}{passes}{', scaled' if self.scaled else ''}"


def compact(record: Mapping[str, Any]) -> Content:
    """What a study found, with the scores of each row as numbers in the order of `metrics`, domain by domain."""
    domains: Content = {}
    cells = []
    for cell in record["cells"]:
        rows = []
        for row in cell.get("rows", ()):
            for found in row["domains"]:
                about = {key: found[key] for key in ("shift", "examples")}
                entropy = found["vote_entropy"]
                domains.setdefault(cell["task"], {})[found["task"]] = {**about, "vote_entropy": _round(entropy)}
            scores = [[_round(found["scores"][key]) for key in METRICS] for found in row["domains"]]
            rows.append([row["samples"], _round(row["temperature"]), scores])
        cost = cell["cost"] and {key: _round(cell["cost"][key]) for key in _KEPT}
        kept = {key: cell[key] for key in ("task", "method", "seed", "hyper", "dials", "error")}
        cells.append({**kept, "cost": cost, "rows": rows})
    return {**record, "schema": SCHEMA, "metrics": list(METRICS), "domains": domains, "cells": cells}


def _round(value: float | None) -> float | None:
    return value if value is None else round(value, DIGITS)


def expand(record: Mapping[str, Any]) -> Content:
    """A record of schema 1, in which every row is a method; `Summary` reads it."""
    if record.get("schema") != SCHEMA:
        raise ValueError(f"This record has schema {record.get('schema')}; a study of passes has schema {SCHEMA}.")
    methods: Content = {}
    cells = []
    rows = {row for cell in record["cells"] for row, _ in rows_of(cell)}
    sampling = {row.method for row in rows if row.samples > 1}
    for name, about in record["methods"].items():
        for row in sorted(row for row in rows if row.method == name):
            several = name in sampling
            methods[row.name(several)] = {**about, "title": row.title(about["title"], several)}
        if all(row.method != name for row in rows):
            methods[name] = about
    for cell in record["cells"]:
        known = {key: cell[key] for key in ("task", "seed", "hyper", "dials", "error")}
        if cell["error"] is not None:
            cells.append({**known, "method": cell["method"], "domains": [], "cost": None})
        for row, scores in rows_of(cell):
            judged = []
            for (domain, about), values in zip(record["domains"][cell["task"]].items(), scores, strict=True):
                named = dict(zip(record["metrics"], values, strict=True))
                judged.append({"task": domain, **about, "scores": named, "reliability": None})
            method = row.name(row.method in sampling)
            cells.append({**known, "method": method, "domains": judged, "cost": _cost(cell, row)})
    return {**record, "schema": 1, "methods": methods, "cells": cells}


def rows_of(cell: Mapping[str, Any]) -> Iterator[tuple[Row, list[list[float | None]]]]:
    """The rows of a cell with their scores, by domain and metric."""
    for samples, temperature, scores in cell["rows"]:
        yield Row(cell["method"], samples, temperature is not None), scores


def _cost(cell: Mapping[str, Any], row: Row) -> Content:
    """Fewer samples need fewer passes."""
    share = row.samples / max(samples for samples, _, _ in cell["rows"])
    cost = {**cell["cost"], "train_peak_mb": None, "predict_peak_mb": None}
    return cost | {key: share * cost[key] for key in ("passes", "predict_ms_per_example")}
