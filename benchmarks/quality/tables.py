"""The tables of the quality report, as Markdown, which the terminal shows too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.quality.summary import (
    ALL,
    BASELINE,
    ERRORS,
    GROUPS,
    METRICS,
    Cell,
    Estimate,
    Summary,
)

BETTER, WORSE = "✓", "✗"
NOTHING = "-"
RANKED = ("accuracy", "nll", "ece")
"""Metrics of the tables that have no room for all."""
TERMINAL = (*RANKED, "vote_cross_entropy")
TERMINAL_COSTS = ("extra_parameters", "predict_ms_per_example", "train_seconds", "fit_seconds")
_COSTS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "extra_parameters": ("extra parameters", lambda value: f"{value:,.0f}"),
    "passes": ("passes of the model", lambda value: f"{value:.3g}"),
    "predict_ms_per_example": ("prediction, ms per example", lambda value: f"{value:.1f}"),
    "train_seconds": ("training, s", lambda value: f"{value:.1f}"),
    "fit_seconds": ("fit after it, s", lambda value: f"{value:.1f}"),
    "tune_seconds": ("choosing dials, s", lambda value: f"{value:.1f}"),
    "train_peak_mb": ("training, peak MB", lambda value: f"{value:,.0f}"),
    "predict_peak_mb": ("prediction, peak MB", lambda value: f"{value:,.0f}"),
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a Markdown table; the first `left` columns are text, the others are numbers."""
    rule = [":---" if number < left else "---:" for number in range(len(header))]
    return [_line(header), _line(rule), *(_line(row) for row in rows)]


def scores(summary: Summary, task: str, group: str, keys: Sequence[str]) -> list[str]:
    """These metrics of every method; the best of each column is bold."""
    best = {key: _best(summary, task, group, key) for key in keys}
    rows = []
    for method in summary.methods:
        found = {key: summary.score(task, group, method, key) for key in keys}
        cells = [bold(number(value), value is not None and value.mean == best[key]) for key, value in found.items()]
        rows.append([_name(summary, method, found.values()), *cells])
    return table(["", *(METRICS[key].title for key in keys)], rows)


def differences(summary: Summary, task: str, group: str, keys: Sequence[str]) -> list[str]:
    """Every method less AdamW in these metrics, paired by seed; marked where it is decided."""
    rows = []
    for method in summary.methods:
        if method != BASELINE:
            found = {key: summary.difference(task, group, method, key) for key in keys}
            cells = [mark(value, key) for key, value in found.items()]
            rows.append([_name(summary, method, found.values()), *cells])
    return table(["", *(METRICS[key].title for key in keys)], rows)


def mark(value: Estimate | None, key: str) -> str:
    """A difference, with a mark for better or worse if it is decided."""
    if value is None or not value.decided:
        return number(value, signed=True)
    return f"{number(value, signed=True)} {BETTER if METRICS[key].better(value.mean, 0) else WORSE}"


def ranks(summary: Summary) -> list[str]:
    """The mean rank over the tasks in which a method has a value, in distribution and under shift."""
    columns = [
        (group, key)
        for group in GROUPS
        for key in RANKED
        if any(key in summary.metrics(task, group) for task in summary.tasks)
    ]
    rankings = {column: [summary.ranking(task, *column) for task in summary.tasks] for column in columns}
    rows = []
    for method in summary.methods:
        cells = []
        for column in columns:
            found = [ranking[method] for ranking in rankings[column] if method in ranking]
            cells.append(f"{sum(found) / len(found):.3g}" if found else NOTHING)
        rows.append([cell_text(summary.title(method)), *cells])
    return table(["", *(f"{METRICS[key].title}, {group}" for group, key in columns)], rows)


def costs(summary: Summary, task: str, keys: Sequence[str] = tuple(_COSTS)) -> list[str]:
    """These costs of every method, the mean over the seeds."""
    rows = []
    for method in summary.methods:
        found = [summary.cost(task, method, key) for key in keys]
        cells = [NOTHING if f is None else _COSTS[key][1](f.mean) for key, f in zip(keys, found, strict=True)]
        rows.append([_name(summary, method, found), *cells])
    return table(["", *(_COSTS[key][0] for key in keys)], rows)


def lost(summary: Summary) -> list[str]:
    """Where a method that is not IVON's has a better mean than every method of IVON's."""
    rows = []
    for found in summary.lost():
        values = {m: summary.score(found.task, found.group, m, found.metric) for m in (found.ours, *found.ahead)}
        ahead = [
            f"{cell_text(summary.title(method))} {number(values[method])} ({mark(gap, found.metric)})"
            for method, gap in found.ahead.items()
        ]
        ours = f"{cell_text(summary.title(found.ours))} {number(values[found.ours])}"
        rows.append([found.task, found.group, METRICS[found.metric].title, ours, "; ".join(ahead)])
    return table(["task", "domains", "metric", "the best of IVON", "better ones (IVON less it)"], rows, left=5)


def tallies(summary: Summary) -> list[str]:
    """Each of IVON's methods against each other method: better, undecided and worse, over everything compared."""
    others = [method for method in summary.methods if method not in summary.ours]
    rows = []
    for other in others:
        cells = [" / ".join(map(str, summary.tally(ours, other))) for ours in summary.ours]
        rows.append([cell_text(summary.title(other)), *cells])
    return table(["", *(cell_text(summary.title(ours)) for ours in summary.ours)], rows)


def domains(summary: Summary) -> list[str]:
    """What was tested on what, how many examples that are, and what chance alone does to an accuracy."""
    rows = []
    for task in summary.tasks:
        for (domain, shift), found in summary.examples(task).items():
            sizes = sorted({each["examples"] for each in found})
            error = max(
                (a * (1 - a) / e["examples"]) ** 0.5 for e in found if (a := e["scores"]["accuracy"]) is not None
            )
            floors = [each["vote_entropy"] for each in found if each["vote_entropy"] is not None]
            floor = f"{sum(floors) / len(floors):.3f}" if floors else NOTHING
            place = f"{domain} (shift)" if shift else domain
            rows.append([task, place, " to ".join(map(str, sizes)), f"{error:.3f}", floor])
    header = ["trained on", "tested on", "examples", "accuracy ±", "votes' entropy"]
    note = "accuracy ±: one standard error of an accuracy on this many examples; the largest of all methods and seeds."
    return [*table(header, rows, left=2), "", note]


def methods(summary: Summary) -> list[str]:
    """What the methods are and where they are described."""
    rows = []
    for name, about in summary.methods.items():
        base = summary.title(about["base"]) if about["base"] in summary.methods else about["base"] or NOTHING
        rows.append([cell_text(about["title"]), summary.kind(name), cell_text(base), cell_text(about["source"])])
    return table(["", "kind", "takes the training of", "source"], rows, left=4)


def tried(summary: Summary, task: str) -> list[str]:
    """Every candidate of every method with its scores on the validation split; the chosen one is bold."""
    rows = []
    for method, search in summary.record["hyperparameters"].get(task, {}).items():
        name = cell_text(summary.title(method)) if method in summary.methods else method
        if not search["tried"]:
            rows.append([name, f"**{settings(search['chosen'])}** (given)", *[NOTHING] * len(RANKED)])
        for candidate in search["tried"]:
            scores = candidate["scores"] or {}
            values = [NOTHING if (v := scores.get(key)) is None else f"{v:.3f}" for key in RANKED]
            reason = f": {cell_text(candidate['error'])}" if candidate["error"] else ""
            text = bold(settings(candidate["hyper"]), candidate["hyper"] == search["chosen"])
            rows.append([name, f"{text}{reason}", *values])
    return table(["", "candidate", *(METRICS[key].title for key in RANKED)], rows, left=2)


def dials(summary: Summary, task: str) -> list[str]:
    """The dials that were chosen for every trained model; no line if no method has any."""
    rows = []
    for method in summary.methods:
        chosen = [f"seed {s}: {settings(c['dials'])}" for s in summary.seeds if (c := summary.cell(task, method, s))]
        if any(c["dials"] for s in summary.seeds if (c := summary.cell(task, method, s))):
            rows.append([cell_text(summary.title(method)), "; ".join(chosen)])
    return table(["", "chosen dials"], rows, left=2) if rows else []


def problems(summary: Summary, cells: Sequence[Cell]) -> list[str]:
    """The cells without scores, with their reasons; seeds with the same one share a row."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        name = summary.title(cell.method) if cell.method in summary.methods else cell.method
        seeds.setdefault((cell.task, name, cell.reason), []).append(str(cell.seed))
    rows = [[task, cell_text(name), ", ".join(s), cell_text(why)] for (task, name, why), s in seeds.items()]
    return table(["task", "method", "seeds", "reason"], rows, left=4)


def legend(summary: Summary, task: str) -> str:
    """What the numbers of a score table are."""
    text = (
        "Mean over seeds ± its standard error; the best mean of each column is bold. NLL in nats; ECE over 10 equal "
        "bins of the confidence, adaptive ECE over 10 bins of equally many examples; Brier summed over the classes (0 "
        "to 2); AUROC of errors: does confidence tell right from wrong (0.5: not at all); selective accuracy: on the "
        "most confident 80%."
    )
    if any("vote_cross_entropy" in summary.metrics(task, group) for group in GROUPS):
        text += " Votes: cross-entropy to the shares of the raters' votes, in nats; at least the votes' own entropy."
    if task == ALL:
        text += " A seed of a method counts here only with a value in every task that has the metric."
    return text


def marks() -> str:
    """What the marks of differences are."""
    return (
        f"{BETTER} better, {WORSE} worse than AdamW by more than {ERRORS:g} standard errors of the paired difference."
    )


def settings(values: Mapping[str, float] | None) -> str:
    """Hyperparameters in a line."""
    return ", ".join(f"{name} {value:g}" for name, value in (values or {}).items()) or "none"


def cell_text(text: str) -> str:
    """Text that cannot break a row of a table."""
    return " ".join(text.split()).replace("|", r"\|")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(summary: Summary, method: str, found: Iterable[Estimate | None]) -> str:
    """The method's title, and how many seeds its row is about if some are missing."""
    seeds = {seed for value in found if value is not None for seed in value.seeds}
    title = cell_text(summary.title(method))
    if len(seeds) == len(summary.seeds):
        return title
    return f"{title} ({len(seeds)} of {len(summary.seeds)} seeds)" if seeds else f"{title} (no scores)"


def number(value: Estimate | None, *, signed: bool = False) -> str:
    """A mean with its standard error."""
    if value is None:
        return NOTHING
    mean = f"{value.mean:{'+' if signed else ''}.3f}"
    return mean if value.error is None else f"{mean} ± {value.error:.3f}"


def bold(text: str, chosen: bool) -> str:
    """The text, bold where it is the chosen one."""
    return f"**{text}**" if chosen else text


def _best(summary: Summary, task: str, group: str, key: str) -> float:
    means = [value.mean for method in summary.methods if (value := summary.score(task, group, method, key))]
    return max(means) if METRICS[key].higher else min(means)
