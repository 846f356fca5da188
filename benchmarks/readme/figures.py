"""The measured tables of the documents, from the committed records alone.

``python -m benchmarks readme`` writes them between their marks, ``<!-- figures: NAME -->`` and ``<!-- end -->``; a test
compares them, so that no figure stands there that no record has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.summary import IN, METRICS, SHIFT, Summary
from benchmarks.quality.tables import NOTHING, bold, mark, number, table

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "benchmarks/evaluate/README.md",
    "benchmarks/finetune/README.md",
    "benchmarks/quality/README.md",
    "docs/gpu-kernels.md",
)
RESULTS = "benchmarks/results"
_BLOCK = re.compile(r"(?P<begin><!-- figures: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_QUALITY = ("accuracy", "nll", "ece")
_FIRST = ("adamw", "temperature", "laplace_all", "ensemble", "ivon_long", "ivon_samples", "ivon_samples_scaled")
_LONG = "quality-240"
_PAIRED = (*_QUALITY, "brier", "vote_cross_entropy")
_WORKLOADS = ("llama-2-7b-r8-qv", "smollm2-135m-r8-qv", "128-tiny", "450-tiny")
_CONTENDERS = {
    "ivon_kernels": "ivon_kernels cpu, sample + step",
    "one pass (`sample_in_step`)": "ivon_kernels cpu, step with next sample",
    "AdamW, foreach": "AdamW (foreach)",
    "ivon-opt 0.1.3": "ivon-opt 0.1.3",
}
_BASELINE = "AdamW (fused)"


def fill(document: str, root: Path) -> str:
    """A document with every block of figures made anew.

    Args:
        document: Its text.
        root: The repository, with the records in `RESULTS`.

    Raises:
        KeyError: A block has a name that is not in `TABLES`.
        FileNotFoundError: A record is missing.
    """

    def block(match: re.Match[str]) -> str:
        lines = TABLES[match["name"]](root / RESULTS)
        return match["begin"] + "\n".join(lines) + "\n" + match["end"]

    return _BLOCK.sub(block, document)


def write() -> None:
    """Write the blocks of all `DOCUMENTS`."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def quality(results: Path, only: Sequence[str] = (), study: str = "quality") -> list[str]:
    """Scores of what someone would choose, in distribution and under shift; passes of the model."""
    summary = Summary(_read(results / study / "quality.json"))
    task = summary.views[0]
    columns = [(group, key) for group in (IN, SHIFT) for key in _QUALITY]
    shown = [m for m in summary.methods if summary.kind(m) != "ablation" and (not only or m in only)]
    leaders = {column: next(m for m in summary.ranking(task, *column) if m in shown) for column in columns}
    best = {column: summary.score(task, column[0], leader, column[1]) for column, leader in leaders.items()}
    rows = []
    for method in shown:
        scores = {column: summary.score(task, column[0], method, column[1]) for column in columns}
        passes = summary.cost(task, method, "passes")
        cells = [bold(number(score), score == best[column]) for column, score in scores.items()]
        rows.append([summary.title(method), *cells, NOTHING if passes is None else f"{passes.mean:.0f}"])
    return table(["", *map(_title, columns), "passes"], rows)


def _title(column: tuple[str, str]) -> str:
    group, key = column
    return METRICS[key].title + (", shift" if group == SHIFT else "")


def repaired(results: Path) -> list[str]:
    """IVON's scaled samples less AdamW, what repairs it after training, and an ensemble of it, paired by seed."""
    summary = Summary(_read(results / _LONG / "quality.json"))
    task, method = summary.views[0], "ivon_samples_scaled"
    columns = [(IN, key) for key in _PAIRED] + [(SHIFT, key) for key in _QUALITY]
    rows = []
    for other in ("adamw", "temperature", "laplace_all", "ensemble"):
        found = [mark(summary.difference(task, group, method, key, other), key) for group, key in columns]
        rows.append([f"less {summary.title(other)}", *found])
    return table([summary.title(method), *map(_title, columns)], rows)


def speed(results: Path) -> list[str]:
    """Small tensors in float32: fused AdamW's time, and the others as multiples of it."""
    record = _read(results / "speed" / "speed.json")
    steps = {(m["workload"], m["contender"]): m for m in record["measurements"] if _is_step(m)}
    rows = []
    for name in _WORKLOADS:
        about = record["workloads"][name]
        title = f"{about['title']}: {about['tensors']} tensors, {about['elements'] / 1e6:.2g}M elements"
        ratios = [f"{steps[name, contender]['ratio']:.2g}x" for contender in _CONTENDERS.values()]
        rows.append([title, f"{steps[name, _BASELINE]['p50']:.2g} ms", *ratios])
    return table(["one optimizer step, float32", "`AdamW(fused=True)`", *_CONTENDERS], rows)


def _is_step(measurement: dict[str, Any]) -> bool:
    wanted = (measurement["part"], measurement["dtype"], measurement["quantity"])
    return wanted == ("steps", "float32", "step") and measurement["error"] is None


def host(results: Path) -> list[str]:
    """What the host does for a step on a GPU, with launches that do nothing."""
    record = _read(results / "speed" / "speed.json")
    found = [m for m in record["measurements"] if m["part"] == "host" and m["error"] is None]
    rows = []
    for contender, workload in dict.fromkeys((m["contender"], m["workload"]) for m in found):
        own = {m["quantity"]: m for m in found if (m["contender"], m["workload"]) == (contender, workload)}
        cells = [f"{m['p50']:.0f} ({m['p20']:.0f} to {m['p80']:.0f})" for m in own.values()]
        rows.append([contender, record["workloads"][workload]["title"], *cells])
    return table(["median us (20% to 80%)", "tensors", "same gradients", "fresh gradients"], rows, left=2)


def finetune(results: Path) -> list[str]:
    """The main job's rows."""
    record = _read(results / "finetune" / "results.json")
    rows = []
    for row in record["rows"]:
        scores = row["scores"]
        rows.append([row["name"], *(f"{scores[key]:.3f}" for key in (*_QUALITY, "brier"))])
    return table(["", "accuracy", "NLL", "ECE", "Brier"], rows)


def evaluate(results: Path) -> list[str]:
    """The main job's posterior, at the mean, by samples and with its dials, domain by domain."""
    record = _read(results / "evaluate" / "evaluate.json")
    keys = (*_QUALITY, "brier", "auroc_errors", "vote_cross_entropy")
    rows = []
    for domain in record["domains"]:
        place = f"{domain['task']}, {'under shift' if domain['shift'] else 'in distribution'}"
        for index, row in enumerate(domain["rows"]):
            scores = [NOTHING if row["scores"][key] is None else f"{row['scores'][key]:.3f}" for key in keys]
            rows.append(["" if index else place, row["name"], *scores])
    return table(["", "", "accuracy", "NLL", "ECE", "Brier", "AUROC", "votes"], rows, left=2)


def stacking(results: Path) -> list[str]:
    """Ten samples in one pass over ten passes, by batch, and what the adapters take."""
    record = _read(results / "stacking" / "stacking.json")
    rows = []
    for batch, timings in record["timings_ms"].items():
        by_name = {timing["name"]: timing for timing in timings}
        cells = [by_name[name]["p50"] for name in ("separate passes", "stacked in one pass")]
        ratio = by_name["stacked in one pass"]["ratio"]
        rows.append([batch, *(f"{value / 1e3:.2f} s" for value in cells), f"{ratio:.2f}"])
    return table(["sequences of 32 tokens", "ten passes", "stacked in one", "ratio"], rows)


TABLES: dict[str, Callable[[Path], Iterable[str]]] = {
    "quality": quality,
    "gains": lambda results: quality(results, _FIRST, _LONG),
    "quality_long": lambda results: quality(results, study=_LONG),
    "repaired": repaired,
    "speed": speed,
    "host": host,
    "finetune": finetune,
    "evaluate": evaluate,
    "stacking": stacking,
}
