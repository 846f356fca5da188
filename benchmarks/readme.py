"""The measured tables of the documents, from the committed records alone.

``python -m benchmarks readme`` writes them between their marks, ``<!-- figures: NAME -->`` and ``<!-- end -->``; a test
compares them, so that no figure stands there that no record has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.finetune import report
from benchmarks.quality.summary import COST, IN, METRICS, SHIFT, Summary, bold, mark, number
from benchmarks.speed.record import read
from benchmarks.tables import NOTHING, markdown

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    *(f"benchmarks/{name}/README.md" for name in ("evaluate", "finetune", "quality")),
    "docs/gpu-kernels.md",
    "docs/posterior.md",
)
RESULTS = "benchmarks/results"
_BLOCK = re.compile(r"(?P<begin><!-- figures: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_QUALITY = ("accuracy", "nll", "ece")
_COLUMNS = tuple((group, key) for group in (IN, SHIFT) for key in _QUALITY)
_FIRST = ("adamw", "temperature", "laplace_all", "ensemble", "ivon_long", "ivon_samples", "ivon_samples_scaled")
_LONG = "quality-240"
_WORKLOADS = ("llama-2-7b-r8-qv", "smollm2-135m-r8-qv", "128-tiny", "450-tiny")
_BASELINE = "AdamW (fused)"
_CONTENDERS = {
    "ivon_kernels cpu, sample + step": "ivon_kernels",
    "ivon_kernels cpu, step with next sample": "one pass (`sample_in_step`)",
    "AdamW (foreach)": "AdamW, foreach",
    "ivon-opt 0.1.3": "ivon-opt 0.1.3",
}


def fill(document: str, root: Path) -> str:
    """A document's text with every block of figures made anew, from the records of the repository `root`."""

    def block(match: re.Match[str]) -> str:
        return f"{match['begin']}{TABLES[match['name']](root / RESULTS)}\n{match['end']}"

    return _BLOCK.sub(block, document)


def write() -> None:
    """Write the blocks of all `DOCUMENTS`."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _title(group: str, key: str) -> str:
    return METRICS[key] + (", shift" if group == SHIFT else "")


def quality(results: Path, study: str, only: tuple[str, ...] = ()) -> str:
    """Scores of what someone would choose, in distribution and under shift; passes of the model."""
    summary = Summary(_read(results / study / "quality.json"))
    task = summary.views[0]
    shown = [m for m in summary.methods if summary.kind(m) != "ablation" and (not only or m in only)]
    table = {"": [summary.title(method) for method in shown]}
    for group, key in _COLUMNS:
        scores = [summary.score(task, group, method, key) for method in shown]
        leader = next(method for method in summary.ranking(task, group, key) if method in shown)
        best = scores[shown.index(leader)]
        table[_title(group, key)] = [bold(number(score), score == best) for score in scores]
    passes = [summary.score(task, COST, method, "passes") for method in shown]
    table["passes"] = [f"{each.mean:.0f}" if each.seeds else NOTHING for each in passes]
    return markdown(pd.DataFrame(table))


def repaired(results: Path) -> str:
    """IVON's scaled samples less AdamW, what repairs it after training, and an ensemble of it, paired by seed."""
    summary = Summary(_read(results / _LONG / "quality.json"))
    task, method = summary.views[0], "ivon_samples_scaled"
    others = ("adamw", "temperature", "laplace_all", "ensemble")
    table = {summary.title(method): [f"less {summary.title(other)}" for other in others]}
    for group, key in (*_COLUMNS[:3], (IN, "brier"), (IN, "vote_cross_entropy"), *_COLUMNS[3:]):
        found = [summary.difference(task, group, method, key, other) for other in others]
        table[_title(group, key)] = [mark(value, key) for value in found]
    return markdown(pd.DataFrame(table))


def speed(results: Path) -> str:
    """Small tensors in float32: fused AdamW's time, and the others as multiples of it."""
    record = read(results / "speed" / "speed.json")
    found = record.measured("steps").query("dtype == 'float32' and quantity == 'step'")
    steps = found.pivot(index="workload", columns="contender", values=["p50", "ratio"]).loc[list(_WORKLOADS)]
    about = [record.workloads[name] for name in _WORKLOADS]
    titles = [f"{w['title']}: {w['tensors']} tensors, {w['elements'] / 1e6:.2g}M elements" for w in about]
    table = steps["ratio"][list(_CONTENDERS)].rename(columns=_CONTENDERS).map("{:.2g}x".format)
    table.insert(0, "`AdamW(fused=True)`", steps["p50", _BASELINE].map("{:.2g} ms".format))
    table.insert(0, "one optimizer step, float32", titles)
    return markdown(table)


def host(results: Path) -> str:
    """What the host does for a step on a GPU, with launches that do nothing."""
    record = read(results / "speed" / "speed.json")
    found = record.measured("host")
    found["tensors"] = [record.workloads[name]["title"] for name in found["workload"]]
    found["cell"] = [f"{m.p50:.0f} ({m.p20:.0f} to {m.p80:.0f})" for m in found.itertuples()]
    rows, columns = found[["contender", "tensors"]].drop_duplicates(), found["quantity"].unique()
    table = found.pivot(index=["contender", "tensors"], columns="quantity", values="cell")
    table = table.loc[list(rows.itertuples(index=False, name=None)), columns].reset_index()
    table.columns = pd.Index(["median us (20% to 80%)", "tensors", "same gradients", "fresh gradients"])
    return markdown(table, left=2)


def finetune(results: Path) -> str:
    """The main job's rows."""
    table = report.table(_read(results / "finetune" / "results.json")["rows"], report.SCORES)
    return markdown(table.rename_axis("").reset_index())


def evaluate(results: Path) -> str:
    """The main job's posterior, at the mean, by samples and with its dials, domain by domain."""
    table = report.table_of_domains(_read(results / "evaluate" / "evaluate.json")["domains"]).reset_index(
        names=["", " "]
    )
    table[""] = table[""].mask(table[""].duplicated(), "")
    return markdown(table, left=2)


def stacking(results: Path) -> str:
    """Ten samples in one pass over ten passes, by batch, and one pass at the mean."""
    record = _read(results / "stacking" / "stacking.json")
    found = pd.DataFrame(record["rows"]).pivot(index="batch", columns="name", values=["p50", "ratio"])
    found.index = found.index.map(str)
    table = found["p50"].map("{:.0f} ms".format)
    table.insert(0, "ratio", found["ratio", "stacked in one pass"].map("{:.2f}".format))
    heads = {"separate passes": "ten passes", "stacked in one pass": "stacked", "ratio": "ratio"}
    table = table[[*heads, "one pass at the mean"]].loc[list(map(str, record["batches"]))]
    return markdown(table.rename(columns=heads).rename_axis("batch").reset_index())


TABLES: dict[str, Callable[[Path], str]] = {
    "quality": partial(quality, study="quality"),
    "gains": partial(quality, study=_LONG, only=_FIRST),
    "quality_long": partial(quality, study=_LONG),
    "repaired": repaired,
    "speed": speed,
    "host": host,
    "finetune": finetune,
    "evaluate": evaluate,
    "stacking": stacking,
}
