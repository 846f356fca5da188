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

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.finetune import report
from benchmarks.finetune.compare import Difference
from benchmarks.finetune.compare import table as differences
from benchmarks.pairs import PAIRS
from benchmarks.pairs import table as compared
from benchmarks.quality.passes_report import FOR_LORA, Ways
from benchmarks.quality.summary import BASELINE, COST, HIGHER, IN, SHIFT, Summary, bold, heading, mark, number
from benchmarks.speed.record import Record, read
from benchmarks.tables import NOTHING, markdown
from ivon_kernels.report.plots import BLUE, GREEN, ORANGE

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    *(f"benchmarks/{name}/README.md" for name in ("evaluate", "finetune", "quality")),
    "docs/gpu-kernels.md",
    "docs/posterior.md",
    "docs/recipe.md",
)
RESULTS = "benchmarks/results"
PICTURES = "docs/pictures"
_SHOWN = {
    "adamw": "AdamW",
    "ivon_long": "IVON, one pass at the mean",
    "ivon_samples_scaled": "IVON, ten scaled samples",
}
_ENOUGH = 5  # examples in a bin, to draw it
_BLOCK = re.compile(r"(?P<begin><!-- figures: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_QUALITY = ("accuracy", "nll", "ece")
_COLUMNS = tuple((group, key) for group in (IN, SHIFT) for key in _QUALITY)
_LONG = "quality-240"
_PASSES = (2, 10)
_ARC = "arc_easy"
_EQUAL = "quality-long/quality.json"
_MOVIE = "vader_movie"
_TASKS = {"vader_nyt": "newspapers", _ARC: "ARC-Easy", _MOVIE: "film reviews"}
_GAINS = (("accuracy", False), ("nll", False), ("nll", True), ("ece", False), ("ece", True))
_MEAN = f"{FOR_LORA}_mean"
_WORKLOADS = ("llama-2-7b-r8-qv", "smollm2-135m-r8-qv", "128-tiny", "450-tiny")
_BASELINE = "AdamW (fused)"
_CONTENDERS = {
    "ivon_kernels cpu, sample + step": "ivon_kernels",
    "ivon_kernels cpu, step with next sample": "in one pass",
    "AdamW (foreach)": "foreach",
    "ivon-opt 0.1.3": "ivon-opt",
}


def fill(document: str, root: Path) -> str:
    """A document's text with every block of figures made anew, from the records of the repository `root`."""

    def block(match: re.Match[str]) -> str:
        return f"{match['begin']}{TABLES[match['name']](root / RESULTS)}\n{match['end']}"

    return _BLOCK.sub(block, document)


def draw(root: Path) -> None:
    """The documents' pictures: what is gained over AdamW, how sure and how often right, and what a step takes."""
    found = {
        "gains": draw_gains(Ways(_read(root / RESULTS / _EQUAL))),
        "reliability": _draw_reliability(Summary(_read(root / RESULTS / _LONG / "quality.json"))),
        "speed": _draw_speed(read(root / RESULTS / "speed" / "speed.json")),
    }
    for name, figure in found.items():
        path = root / PICTURES / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw_gains(ways: Ways) -> Figure:
    """Differences to AdamW, paired by seed, of what README's tables have: a row for each, a color for each task."""
    tasks = {task: title for task, title in _TASKS.items() if task in ways.summary.tasks}
    by_task = {task: shown(ways, task) for task in tasks}
    names = [name for name in ways.methods if name != BASELINE and any(name in found for found in by_task.values())]
    places = {name: len(names) - place for place, name in enumerate(names)}
    figure, axes = plt.subplots(1, len(_GAINS), figsize=(9, 0.9 + 0.4 * len(names)), layout="constrained", sharey=True)
    colors, shifts = (BLUE, ORANGE, GREEN), (0.22, 0, -0.22)
    for ax, (key, scaled) in zip(axes, _GAINS, strict=True):
        for (task, title), color, shift in zip(tasks.items(), colors, shifts, strict=False):
            for name in (name for name in names if name in by_task[task]):
                ours, other = (ways.at(method, max(ways.counts), scaled) for method in (name, BASELINE))
                gap = ways.less(task, IN, ours, other, key)
                style: dict[str, Any] = {"color": color, "marker": "o" if name in ways.ours else "s", "markersize": 5}
                style |= {"markerfacecolor": color if gap.verdict(key) else "white"}
                ax.errorbar(gap.mean, places[name] + shift, xerr=gap.error, **style)
            ax.plot([], [], "o", color=color, label=title)
        ax.axvline(0, color="0.4", linewidth=0.9)
        better = "better \N{RIGHTWARDS ARROW}" if key in HIGHER else "\N{LEFTWARDS ARROW} better"
        ax.set_title(f"{heading(key, scaled=scaled)}\n{better}", fontsize=10)
        ax.grid(alpha=0.25, axis="x")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.locator_params(axis="x", nbins=3)
        ax.tick_params(axis="x", labelsize=8)
    seen = {name: next(task for task in tasks if name in by_task[task]) for name in names}
    called = [ways.brief(seen[name], ways.at(name, max(ways.counts), False)) for name in names]
    axes[0].set_yticks([places[name] for name in names], called)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name in ways.ours else "normal")
    figure.supxlabel("less AdamW (the line), mean and standard error; filled: by more than two of these", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_reliability(summary: Summary) -> Figure:
    """Three ways to predict after ten epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained", sharex=True, sharey=True)
    for ax, (method, title), color in zip(axes, _SHOWN.items(), ("0.4", BLUE, BLUE), strict=True):
        points = summary.reliability(summary.views[0], IN, method)
        points = points[points["count"] >= _ENOUGH]
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
        ax.plot(points["confidence"], points["accuracy"], color=color)
        area = 300 * points["count"] / points["count"].sum()
        ax.scatter(points["confidence"], points["accuracy"], area, color=color, clip_on=False)
        score = summary.score(summary.views[0], IN, method, "ece")
        ax.text(0.05, 0.9, f"ECE {score.mean:.3f}", transform=ax.transAxes)
        ax.set(title=title, xlabel="how sure it is", xlim=(0.3, 1), ylim=(0.3, 1))
    axes[0].set_ylabel("how often it is right")
    return figure


def _draw_speed(record: Record) -> Figure:
    """Four ways to take a step."""
    found = record.measured("steps").query("dtype == 'float32' and quantity == 'step' and workload == @_WORKLOADS[0]")
    times = found.set_index("contender")["p50"].loc[[_BASELINE, *list(_CONTENDERS)[:2], "ivon-opt 0.1.3"]]
    figure, ax = plt.subplots(figsize=(7, 1.9), layout="constrained")
    bars = ax.barh(["AdamW, fused", "IVON, sample + step", "IVON in one pass", "ivon-opt 0.1.3"], times)
    for bar, color in zip(bars, ("0.6", BLUE, BLUE, "0.6"), strict=True):
        bar.set_color(color)
    ax.bar_label(bars, [f"{time:.1f} ms" for time in times], padding=4, fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="one step of Llama-2-7B's LoRA, ms", xlim=(0, 1.12 * times.max()))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def write() -> None:
    """Write the blocks of all `DOCUMENTS`, and README's pictures."""
    draw(ROOT)
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def quality(results: Path, study: str) -> str:
    """Scores of what someone would choose, in distribution and under shift; passes of the model."""
    summary = Summary(_read(results / study / "quality.json"))
    task = summary.views[0]
    shown = [m for m in summary.methods if summary.kind(m) != "ablation"]
    table = {"": [summary.title(method) for method in shown]}
    for group, key in _COLUMNS:
        scores = [summary.score(task, group, method, key) for method in shown]
        leader = next(method for method in summary.ranking(task, group, key) if method in shown)
        best = scores[shown.index(leader)]
        table[heading(key, group)] = [bold(number(score), score == best) for score in scores]
    passes = [summary.score(task, COST, method, "passes") for method in shown]
    table["passes"] = [f"{each.mean:.0f}" if each.seeds else NOTHING for each in passes]
    return markdown(pd.DataFrame(table))


def passes(results: Path, make: Callable[[Ways, str], str], task: str = "vader_nyt") -> str:
    """A table of the study at equal numbers of passes."""
    return make(Ways(_read(results / _EQUAL)), task)


def shown(ways: Ways, view: str) -> list[str]:
    """README's choice of the methods: what someone would take, where all seeds have run."""
    whole = [name for name in ways.seen(view) if not ways.of_seeds(view, ways.at(name, 1, False))]
    return [name for name in whole if name in (*ways.rivals, FOR_LORA, _MEAN)]


def gains(ways: Ways, view: str) -> str:
    """README's methods, each at its most passes."""
    without = [name for name in ways.seen(view) if name not in shown(ways, view)]
    return ways.at_a_glance(view, IN, _PASSES[-1:], without)


def glance(ways: Ways, view: str, group: str = IN) -> str:
    """All methods but what was tried on top of `for_lora`, which has a table of its own."""
    return ways.at_a_glance(view, group, _PASSES, [name for name in ways.variants if name != _MEAN])


def repaired(results: Path) -> str:
    """IVON's scaled samples less AdamW, what repairs it after training, and an ensemble of it, paired by seed."""
    summary = Summary(_read(results / _LONG / "quality.json"))
    task, method = summary.views[0], "ivon_samples_scaled"
    others = ("adamw", "temperature", "laplace_all", "ensemble")
    table = {summary.title(method): [f"less {summary.title(other)}" for other in others]}
    for group, key in (*_COLUMNS[:3], (IN, "brier"), (IN, "vote_cross_entropy"), *_COLUMNS[3:]):
        found = [summary.difference(task, group, method, key, other) for other in others]
        table[heading(key, group)] = [mark(value, key) for value in found]
    return markdown(pd.DataFrame(table))


def speed(results: Path) -> str:
    """Small tensors in float32: fused AdamW's time, and the others as multiples of it."""
    record = read(results / "speed" / "speed.json")
    found = record.measured("steps").query("dtype == 'float32' and quantity == 'step'")
    steps = found.pivot(index="workload", columns="contender", values=["p50", "ratio"]).loc[list(_WORKLOADS)]
    about = [record.workloads[name] for name in _WORKLOADS]
    titles = [f"{w['title']} ({w['elements'] / 1e6:.2g}M)" for w in about]
    table = steps["ratio"][list(_CONTENDERS)].rename(columns=_CONTENDERS).map("{:.2g}x".format)
    table.insert(0, "fused AdamW", steps["p50", _BASELINE].map("{:.2g} ms".format))
    table.insert(0, "one step, float32", titles)
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


def pairs(results: Path) -> str:
    """AdamW and IVON at one learning rate."""
    found = {path.stem: _read(path) for path in (results / "pairs").glob("*.json")}
    return markdown(compared({name: found[name] for name in PAIRS if name in found}))


def finetune(results: Path) -> str:
    """The main job's rows."""
    table = report.table(_read(results / "finetune" / "results.json")["rows"], report.SCORES)
    return markdown(table.rename_axis("").reset_index())


def finetune_seeds(results: Path) -> str:
    """The main job's NLL less AdamW's, a row for each seed, and the mean of all with its standard error."""
    rows, values = [], []
    for record in map(_read, (results / "finetune").glob("*.json")):
        scores = {row["name"]: row["scores"]["nll"] for row in record["rows"]}
        less = {
            name: {key: Difference(**each) for key, each in found.items()}
            for name, found in record["less_adamw"].items()
        }
        row = {"NLL, less AdamW's": f"seed {record['settings']['seed']}", "AdamW": f"{scores['AdamW']:.3f}"}
        rows.append(row | {name: cell.strip() for name, cell in differences(less)["NLL"].items()})
        values.append({"AdamW": scores["AdamW"], **{name: found["nll"].value for name, found in less.items()}})
    table, found = pd.DataFrame(rows).sort_values("NLL, less AdamW's"), pd.DataFrame(values)
    mean, error = found.mean(), found.sem()
    table.loc[len(table)] = {"NLL, less AdamW's": "mean"} | {n: f"{mean[n]:.3f} ± {error[n]:.3f}" for n in found}
    return markdown(table)


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
    "gains": partial(passes, make=gains),
    "pairs": pairs,
    "quality_long": partial(quality, study=_LONG),
    "repaired": repaired,
    "glance": partial(passes, make=glance),
    "glance_arc": partial(passes, make=glance, task=_ARC),
    "glance_movie": partial(passes, make=glance, task=_MOVIE),
    "glance_movie_shift": partial(passes, make=partial(glance, group=SHIFT), task=_MOVIE),
    "glance_shift": partial(passes, make=partial(glance, group=SHIFT)),
    "tried": partial(passes, make=lambda ways, view: ways.tried(view, _PASSES)),
    "passes_nll": partial(passes, make=lambda ways, view: ways.by_passes(view, IN, "nll")),
    "wins": partial(passes, make=lambda ways, view: ways.wins(_PASSES)),
    "speed": speed,
    "host": host,
    "finetune": finetune,
    "finetune_seeds": finetune_seeds,
    "evaluate": evaluate,
    "stacking": stacking,
}
