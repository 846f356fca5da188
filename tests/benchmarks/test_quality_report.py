"""The quality suite's report, from synthetic records: numbers against numpy and scipy, and what is missing named."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from benchmarks.quality import pictures, report
from benchmarks.quality.summary import ALL, BETTER, COST, HIGHER, IN, METRICS, READY, SHIFT, Summary

TASK = "vader_nyt"
METHODS = {
    "adamw": {"title": "AdamW", "source": "Loshchilov", "base": None, "ablation": False},
    "swag": {"title": "SWAG | LoRA", "source": "Onal", "base": None, "ablation": False},
    "noise": {"title": "fixed noise", "source": "none", "base": None, "ablation": True},
    "ivon": {"title": "IVON, mean", "source": "Shen", "base": None, "ablation": False},
    "ivon_samples": {"title": "IVON, samples", "source": "Cong", "base": "ivon", "ablation": False},
}
NLL = {  # by method, seeds 0 to 2
    "adamw": [0.90, 0.80, 0.85],
    "swag": [0.70, 0.60, 0.68],
    "noise": [0.80, 0.95, 0.86],
    "ivon": [0.88, 0.79, 0.83],
    "ivon_samples": [0.84, 0.75, 0.78],
}


def domain(task: str, trained: float, more: float = 0.0, *, rated: bool = True) -> dict[str, Any]:
    """With an NLL of `trained`, and `more` under shift; IVON's methods are the best by AUROC alone."""
    nll, shift = trained + more, more > 0
    scores: dict[str, float | None] = {key: 1 - nll / 2 if key in HIGHER else nll / 2 for key in METRICS}
    scores |= {"nll": nll, "auroc_errors": 1 - abs(trained - 0.8), "aurc": 0.2}
    scores["vote_cross_entropy"] = nll + 0.1 if rated else None
    return {
        "task": task,
        "shift": shift,
        "examples": 100,
        "vote_entropy": 0.5 if rated else None,
        "scores": scores,
        "reliability": {"confidence": [0.55, 0.95], "accuracy": [0.5, nll], "counts": [0] * 5 + [60] + [0] * 3 + [40]},
    }


def cell(task: str, method: str, seed: int, *, shifted: bool, rated: bool = True) -> dict[str, Any]:
    nll = NLL[method][seed]
    domains = [domain(task, nll, rated=rated)]
    if shifted:
        domains += [
            domain("vader_movie", nll, 0.1, rated=rated),
            domain("vader_tweets", nll, 0.3, rated=rated),
        ]
    cost = {
        "extra_parameters": 0 if method == "adamw" else 1234567,
        "passes": 1.0,
        "train_seconds": 50.0 + seed,
        "fit_seconds": 3.0,
        "tune_seconds": 0.0,
        "predict_ms_per_example": 200.0 if method == "ivon_samples" else 20.0 + nll,
        "train_peak_mb": 900.0,
        "predict_peak_mb": 800.0,
    }
    dials = {"temperature": 0.3} if method == "ivon_samples" else {}
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "hyper": {"lr": 1e-3},
        "dials": dials,
        "error": None,
        "domains": domains,
        "cost": cost,
    }


def made(
    tasks: tuple[str, ...] = (TASK,), seeds: int = 3, *, shifted: bool = True, rated: bool = True
) -> dict[str, Any]:
    tried = [
        {"hyper": {"lr": 1e-3}, "scores": {"accuracy": 0.66, "nll": 0.812, "ece": 0.07}, "error": None},
        {"hyper": {"lr": 2e-3}, "scores": None, "error": "it diverged"},
    ]
    found = {"chosen": {"lr": 1e-3}, "tried": tried, "from": "search"}
    trainers = [method for method, about in METHODS.items() if about["base"] is None]
    return {
        "schema": 1,
        "finished": True,
        "settings": {"size": "laptop", "steps": 60, "tasks": list(tasks), "seeds": list(range(seeds)), "model": None},
        "device": "cpu",
        "threads": 2,
        "environment": {"date": "today", "processor": "a processor", "versions": {"torch": "2.13"}},
        "methods": copy.deepcopy(METHODS),
        "hyperparameters": {task: {method: copy.deepcopy(found) for method in trainers} for task in tasks},
        "cells": [
            cell(task, method, seed, shifted=shifted and task == TASK, rated=rated)
            for task in tasks
            for method in METHODS
            for seed in range(seeds)
        ],
    }


def find(record: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
    """The cell of the record's first task."""
    return next(c for c in record["cells"] if (c["method"], c["seed"]) == (method, seed))


def fail(record: dict[str, Any], method: str, seed: int) -> None:
    find(record, method, seed).update(error="RuntimeError: no | way", domains=[], cost=None)


def row(table: str, start: str) -> list[str]:
    """The cells of the only row that begins with this."""
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [text.strip() for text in re.split(r"(?<!\\)\|", found)[1:-1]]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_means_and_their_errors_are_scipys() -> None:
    summary = Summary(made())
    for method, values in NLL.items():
        score = summary.score(TASK, IN, method, "nll")
        assert score.mean == pytest.approx(np.mean(values))
        assert score.error == pytest.approx(stats.sem(values))  # ddof 1
        shift = summary.score(TASK, SHIFT, method, "nll")
        assert shift.mean == pytest.approx(np.mean(values) + 0.2)  # the mean of both shifted domains
        assert shift.error == pytest.approx(stats.sem(values))  # of three seeds, not of six domains


def test_differences_are_paired_by_seed() -> None:
    summary = Summary(made())
    gaps = np.subtract(NLL["ivon_samples"], NLL["adamw"])
    found = summary.difference(TASK, IN, "ivon_samples", "nll")
    assert found.mean == pytest.approx(gaps.mean())
    # The t statistic of the paired test is the mean over this error; that of the unpaired one is another.
    assert found.mean / (found.error or 0) == pytest.approx(
        stats.ttest_rel(NLL["ivon_samples"], NLL["adamw"]).statistic
    )
    assert found.verdict("nll") == 1
    undecided = summary.difference(TASK, IN, "noise", "nll")
    assert undecided.seeds and undecided.verdict("nll") == 0


def test_ranks_share_ties_and_know_which_direction_is_better() -> None:
    record = made()
    for seed in range(3):
        find(record, "noise", seed)["domains"][0]["scores"] = find(record, "adamw", seed)["domains"][0]["scores"]
    ranks = {"swag": 1, "ivon_samples": 2, "ivon": 3, "adamw": 4, "noise": 4}
    assert Summary(record).ranking(TASK, IN, "nll") == ranks
    assert Summary(record).ranking(TASK, IN, "accuracy") == ranks


def test_where_ivon_does_not_win() -> None:
    summary = Summary(made())
    assert summary.ours == ["ivon", "ivon_samples"]
    lost = {(group, metric): (ours, ahead) for _, group, metric, ours, ahead in summary.lost()}
    assert {metric for group, metric in lost if group == IN} == set(METRICS) - {"auroc_errors"}
    assert lost[IN, "nll"] == ("ivon_samples", ["swag"])
    gap = summary.difference(TASK, IN, "ivon_samples", "nll", "swag")
    assert gap.verdict("nll") == -1
    assert gap.mean == pytest.approx(np.mean(NLL["ivon_samples"]) - np.mean(NLL["swag"]))
    # Eight metrics in two groups.
    assert summary.tally("ivon_samples", "swag") == (2, 0, 14)
    assert summary.tally("swag", "ivon_samples") == (14, 0, 2)
    assert summary.tally("noise", "adamw") == (0, 16, 0)


def test_the_mean_over_tasks_is_taken_seed_by_seed() -> None:
    record = made((TASK, "bigbench_strategyqa"))
    for each in record["cells"]:
        if each["task"] != TASK:
            each["domains"][0]["scores"]["nll"] = 1.0 + each["seed"]
    fail(record, "swag", 1)
    summary = Summary(record)
    assert summary.views == [ALL, TASK, "bigbench_strategyqa"]
    score = summary.score(ALL, IN, "adamw", "nll")
    mean = np.add(NLL["adamw"], [1, 2, 3]) / 2
    assert (score.mean, score.error) == pytest.approx((mean.mean(), stats.sem(mean)))
    partial = summary.score(ALL, IN, "swag", "nll")
    assert partial.seeds == (0, 2)  # seed 1 has no value in one of the tasks
    shift = summary.score(ALL, SHIFT, "adamw", "nll")
    assert shift.mean == pytest.approx(np.mean(NLL["adamw"]) + 0.2)  # only one task has shifted domains


def test_one_seed_has_no_error_and_decides_nothing() -> None:
    summary = Summary(made(seeds=1))
    score = summary.score(TASK, IN, "swag", "nll")
    assert (score.mean, score.error) == (0.70, None)
    verdicts = [
        summary.difference(TASK, group, "swag", metric).verdict(metric) for _, group, metric in summary.comparisons()
    ]
    assert verdicts and not any(verdicts)
    assert row(report.scores(summary, TASK, IN, ["nll"]), r"SWAG \| LoRA")[1] == "**0.700**"


def test_failed_and_missing_cells_leave_the_other_seeds_and_are_named() -> None:
    record = made()
    fail(record, "swag", 1)
    record["cells"].remove(find(record, "ivon", 2))
    summary = Summary(record)
    score = summary.score(TASK, IN, "swag", "nll")
    assert (score.mean, score.error) == pytest.approx((0.69, stats.sem([0.70, 0.68])))
    gap = summary.difference(TASK, IN, "swag", "nll", "ivon")
    assert (gap.seeds, gap.error) == ((0,), None)  # the only seed that both have
    assert [cell[1:3] for cell in summary.failed] == [("swag", 1)]
    assert summary.missing == [(TASK, "ivon", 2, "has not run")]
    lines = report.scores(summary, TASK, IN, ["nll"])
    assert row(lines, r"SWAG \| LoRA (2 of 3 seeds)") and row(lines, "IVON, mean (2 of 3 seeds)")
    found = [report.problems(summary, cells) for cells in (summary.failed, summary.missing)]
    assert row(found[0], TASK)[1:] == [r"SWAG \| LoRA", "1", r"RuntimeError: no \| way"]
    assert row(found[1], TASK)[1:] == ["IVON, mean", "2", "has not run"]


def test_a_score_that_is_null_in_one_shifted_domain_leaves_the_seed_out() -> None:
    record = made()
    find(record, "swag", 0)["domains"][1]["scores"]["auroc_errors"] = None
    find(record, "swag", 1)["domains"][0]["scores"]["auroc_errors"] = None
    summary = Summary(record)
    shift, place = (summary.score(TASK, group, "swag", "auroc_errors") for group in (SHIFT, IN))
    assert shift.seeds == (1, 2)
    assert place.seeds == (0, 2)


def test_votes_are_averaged_over_the_domains_that_have_them() -> None:
    record = made()
    for each in record["cells"]:
        each["domains"][2]["vote_entropy"] = each["domains"][2]["scores"]["vote_cross_entropy"] = None
    score = Summary(record).score(TASK, SHIFT, "adamw", "vote_cross_entropy")
    assert score.mean == pytest.approx(np.mean(NLL["adamw"]) + 0.1 + 0.1)


def test_reliability_is_pooled_over_seeds_and_domains() -> None:
    record = made()
    find(record, "adamw", 0)["domains"][0]["reliability"] = {
        "confidence": [0.65, 0.95],
        "accuracy": [0.3, 0.5],
        "counts": [0] * 6 + [90] + [0] * 2 + [10],
    }
    pooled = Summary(record).reliability(TASK, IN, "adamw")
    assert pooled["count"].tolist() == [120, 90, 90]
    assert pooled["confidence"].tolist() == pytest.approx([0.55, 0.65, 0.95])
    assert pooled["accuracy"].tolist() == pytest.approx([0.5, 0.3, (10 * 0.5 + 40 * 0.80 + 40 * 0.85) / 90])
    assert Summary(record).reliability(TASK, SHIFT, "adamw")["count"].tolist() == [360, 240]


def test_costs_are_means_and_training_includes_the_fit() -> None:
    summary = Summary(made())
    ready = summary.score(TASK, COST, "swag", READY)
    assert (ready.mean, ready.error) == pytest.approx((54.0, stats.sem([50, 51, 52])))
    assert row(report.costs(summary, TASK), "IVON, mean")[1] == "1,234,567"
    assert summary.score(TASK, COST, "swag", "fit_seconds").mean == 3.0


# ---- the page --------------------------------------------------------------------------------------------------------


def page_of(folder: Path) -> str:
    """The page; every picture that it shows is there and no other, and no table has a ragged row."""
    text = (folder / report.PAGE).read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.png"))
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    assert "None" not in text and "nan" not in text
    return text


@pytest.mark.slow
def test_the_page_with_everything(tmp_path: Path) -> None:
    style = dict(matplotlib.rcParams)
    record = json.loads(json.dumps(made()))
    report.write_report(record, tmp_path / "new" / "folder")
    text = page_of(tmp_path / "new" / "folder")
    assert dict(matplotlib.rcParams) == style
    assert len(list((tmp_path / "new" / "folder").glob("*.png"))) == 4
    summary = Summary(record)
    lines = text.split("### Scores in distribution")[1].split("### Difference")[0]
    for method in ("adamw", "ivon_samples"):
        values = [summary.score(TASK, IN, method, key) for key in METRICS]
        shown = [f"{value.mean:.3f} ± {value.error:.3f}" for value in values]
        assert [text.strip("*") for text in row(lines, summary.title(method))[1:]] == shown
    gap = np.subtract(NLL["ivon_samples"], NLL["adamw"])
    assert f"{gap.mean():+.3f} ± {stats.sem(gap):.3f} {BETTER}" in text
    assert f"in {2 * stats.t.sf(2, 2):.0%} of all comparisons with 3 seeds" in text  # 18%
    p = 1 - (np.array(list(NLL.values())) + 0.3) / 2
    error = np.sqrt(p * (1 - p) / 100).max()
    assert row(text, f"{TASK} | vader_tweets (shift)")[2:4] == ["100", f"{error:.3f}"]
    assert "| AdamW | **lr 0.001** | 0.660 | 0.812 | 0.070 |" in text
    assert "| AdamW | lr 0.002: it diverged | - | - | - |" in text
    assert "seed 0: temperature 0.3" in text
    assert "Of 16 combinations of task, domains and metric" in text and "in 14, and in 14 of these" in text
    assert "torch 2.13" in text and "60 training steps" in text
    assert "What failed" not in text and "Not finished" not in text


@pytest.mark.slow
def test_the_page_of_one_seed_without_votes_and_shift(tmp_path: Path) -> None:
    record = made(seeds=1, shifted=False, rated=False)
    record["hyperparameters"][TASK]["adamw"].update(tried=[], **{"from": "file"})
    fail(record, "noise", 0)
    report.write_report(record, tmp_path)
    text = page_of(tmp_path)
    assert "otes" not in text.replace("votes' entropy", "")
    assert "under shift" not in text and "±" not in text.split("### Scores in distribution")[1].split("Mean over")[0]
    assert "One seed has no standard error" in text
    assert "| AdamW | **lr 0.001** (given) | - | - | - |" in text
    assert "| fixed noise (no scores) |" in text
    assert rf"| {TASK} | fixed noise | 0 | RuntimeError: no \| way |" in text


def test_a_page_where_everything_failed_or_has_not_run(tmp_path: Path) -> None:
    record = made(("bigbench_strategyqa", TASK))
    record["finished"] = False
    for method in METHODS:
        for seed in range(3):
            fail(record, method, seed)
    record["cells"] = [each for each in record["cells"] if each["error"] is not None]
    report.write_report(record, tmp_path)
    text = page_of(tmp_path)
    assert "Not finished: 15 combinations" in text and "No method has scores" in text
    assert f"| {TASK} | AdamW | 0, 1, 2 | has not run |" in text


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema 2"):
        report.write_report({**made(), "schema": 2}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_terminal_fits_eighty_columns() -> None:
    record = made((TASK, "bigbench_strategyqa"))
    fail(record, "noise", 0)
    out = io.StringIO()
    report.print_tables(Console(file=out, width=80), record)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    values = NLL["adamw"]
    assert f"{np.mean(values):.3f} ± {stats.sem(values):.3f}" in text
    assert "RuntimeError" in text and "prediction" in text and BETTER in text
    assert "…" not in text.replace("bigbench_st…", "")


# ---- the pictures ----------------------------------------------------------------------------------------------------


def test_methods_come_by_their_kind() -> None:
    assert list(Summary(made()).methods) == ["adamw", "swag", "ivon", "ivon_samples", "noise"]


def test_the_pareto_front_is_what_nothing_beats_in_both() -> None:
    record = made()
    for seed in range(3):
        find(record, "adamw", seed)["cost"]["predict_ms_per_example"] = 5.0
    ax = pictures.pareto(Summary(record), TASK, IN).axes[2]  # NLL against the time of a prediction
    (front,) = (line for line in ax.get_lines() if line.get_linestyle() == "--")
    # `adamw` is the fastest and `swag` the best; all others are slower than both and have more NLL than `swag`.
    assert front.get_xydata() == pytest.approx(np.array([[5.0, 0.85], [20.66, 0.66]]))
