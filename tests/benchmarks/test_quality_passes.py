"""A study of several numbers of passes: TFB, IVON by `for_lora`, rows from one training, its record and report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks import UserError
from benchmarks.__main__ import app
from benchmarks.finetune import data, model
from benchmarks.finetune.data import Example
from benchmarks.finetune.scorers import scorer_of
from benchmarks.finetune.tasks import TASKS
from benchmarks.finetune.train import InterruptGuard
from benchmarks.quality import settings
from benchmarks.quality.bench import CALIBRATION
from benchmarks.quality.method import Job, nll
from benchmarks.quality.methods import adamw, all_methods, tfb
from benchmarks.quality.passes import Row, compact, expand
from benchmarks.quality.passes_report import Ways, write_report
from benchmarks.quality.settings import LONG_METHODS, LONG_TASKS, SIZES
from benchmarks.quality.study import select
from benchmarks.quality.summary import IN, METRICS
from ivon_kernels import IVON
from ivon_kernels.predict import metrics
from tests.support.finetune_model import save_tiny_model

# PEFT asks transformers by a name that transformers is about to change; laplace-torch imports what torch deprecates.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
METHODS = all_methods()
CPU = torch.device("cpu")
STUDIED = (
    *("adamw", "ensemble", "tfb", "ivon_adamw_rate", "ivon_for_lora"),
    *("ivon_for_lora_left_out", "ivon_for_lora_mean"),
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tiny_model: Path) -> Job:
    base, tokenizer = model.load_model(str(tiny_model), device=CPU, in_8bit=False)
    adapted = model.add_lora(base, seed=0)
    found = data.load_dataset(TASKS["vader_nyt"], split="validation", train_size=24, test_size=14, max_words=12)
    scorer = scorer_of(TASKS["vader_nyt"], adapted, tokenizer, found.train[0])
    examples = data.EncodedExamples(found.train, tokenizer, 320, CPU)
    job = Job(adapted, scorer, examples, 0, 20, 6, 3, InterruptGuard())
    job.restart()
    return job


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_logits_of_answers_are_the_mean_log_likelihoods_of_their_tokens(tiny_model: Path) -> None:
    base, tokenizer = model.load_model(str(tiny_model), device=CPU, in_8bit=False)
    adapted = model.add_lora(base, seed=0).eval()
    questions = [
        Example("it was a day", 0, answers=("good day", "bad", "the a bad", "it")),
        Example("the", 1, answers=("a", "bad good", "good bad it", "day day")),
    ]
    scorer = scorer_of(TASKS["arc_easy"], adapted, tokenizer, questions[0])
    (batch,) = data.EncodedExamples(questions, tokenizer, 320, CPU).in_length_order(8)
    found = scorer(batch)
    assert found.shape == (2, 4)
    for logits, i in zip(found, batch.index, strict=True):
        question = tokenizer(questions[i].prompt)["input_ids"]
        for logit, answer in zip(logits, questions[i].answers, strict=True):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            rows = adapted(input_ids=torch.tensor([question + ids])).logits[0].log_softmax(1)
            each = [rows[len(question) - 1 + k, token] for k, token in enumerate(ids)]
            torch.testing.assert_close(logit, torch.stack(each).mean(), rtol=1e-5, atol=1e-5)


def test_overlong_questions_lose_their_beginning_and_no_answer(tiny_model: Path) -> None:
    _, tokenizer = model.load_model(str(tiny_model), device=CPU, in_8bit=False)
    examples = [Example("it was a bad day", 0, answers=("good", "bad"))]
    (batch,) = data.EncodedExamples(examples, tokenizer, 4, CPU).in_length_order(1)
    assert tokenizer.decode(batch.input_ids[0, 0]) == "bad day good bad"
    assert batch.input_ids[0, 1].tolist() == [0, 0, 1, 2]


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_tfb_takes_the_largest_sigma_within_the_tolerance() -> None:
    losses = [1.0, 1.1, 1.4, 2.0]
    assert tfb.largest(losses, 0.25) == pytest.approx(0.0015)
    assert tfb.largest(losses, 0.0) == 0.0
    assert tfb.largest(losses, 5.0) == tfb.SIGMAS[2]
    assert tfb.largest([1.0, 1.5], 0.1) == pytest.approx(0.0002)


def test_tfb_noise_is_isotropic_in_the_columns_of_b(job: Job) -> None:
    adamw.AdamW("a", "a", "a").train(job, {"lr": 1e-2})
    before, noise = job.weights(), torch.Generator().manual_seed(0)
    module: Any = next(m for m in job.model.modules() if isinstance(m, LoraLayer))
    b, mean = module.lora_B["default"].weight, module.lora_A["default"].weight.detach().clone()
    basis = torch.linalg.svd(b.detach(), full_matrices=False).U
    draws = []
    for _ in range(2_000):
        with tfb.sampled(job, tfb.bases(job), 0.01, noise):
            draws.append(basis.T @ b @ (module.lora_A["default"].weight - mean))
    noises = torch.stack(draws).detach().double()
    # a variance's standard error is sqrt(2 / n) of it, a correlation's 1 / sqrt(n); six of them, for all the entries
    assert (noises.var(0) / 0.01**2 - 1).abs().max() < 6 * math.sqrt(2 / len(noises)) + 0.01
    flat = noises.flatten(1).T[:20]
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 6 / math.sqrt(len(noises))
    assert torch.equal(job.weights(), before)


def test_tfb_loses_as_much_as_it_may(job: Job) -> None:
    adamw.AdamW("a", "a", "a").train(job, {"lr": 1e-2})
    method = METHODS["tfb"]
    state = method.fit(job, {}, {})
    examples, losses = job.training_set, state["losses"].tolist()
    assert losses[0] == pytest.approx(nll(job.logits(examples).softmax(1), examples))
    assert losses[-1] > losses[0]
    assert torch.equal(method.fit(job, {}, {})["losses"], state["losses"])
    at_mean = tfb.noisy(job, 0.0, examples)
    torch.testing.assert_close(at_mean[0], job.logits(examples).softmax(1))


def test_ivon_has_the_settings_of_for_lora(job: Job) -> None:
    expected = IVON.for_lora(job.model, len(job.training_set), steps=job.steps, seed=0)
    state = METHODS["ivon_for_lora"].train(job, {})
    assert state["ess"].item() == pytest.approx(expected.param_groups[0]["ess"], rel=1e-6)
    assert len(state) == 1 + len(job.parameters)
    each = METHODS["ivon_for_lora"].each(job, state, {}, job.training_set)
    assert each.shape == (job.samples, len(job.training_set), 3)
    mean = METHODS["ivon_for_lora_mean"].each(job, state, {}, job.training_set)
    assert mean.shape[0] == 1 and not torch.equal(mean[0], each.mean(0))
    pairs = METHODS["ivon_for_lora_pairs"].each(job, state, {}, job.training_set)
    assert pairs.shape == each.shape and torch.allclose(pairs[0], each[0]) and not torch.allclose(pairs[1], each[1])
    # What a sample moves the logits by, its mirror image takes back, but for what is not linear.
    moved = (pairs[:2].log() - mean.log()).flatten(1)
    assert torch.corrcoef(moved)[0, 1] < -0.5


def test_ivon_takes_the_rate_that_was_chosen_for_adamw(job: Job) -> None:
    method = METHODS["ivon_adamw_rate"]
    expected = IVON.for_lora(job.model, len(job.training_set), learning_rate=3e-4, steps=job.steps, seed=0)
    state = method.train(job, {"lr": 3e-4})
    assert state["ess"].item() == pytest.approx(expected.param_groups[0]["ess"], rel=1e-6)
    assert state["ess"] != METHODS["ivon_for_lora"].train(job, {})["ess"]


def test_examples_left_out_take_the_place_of_the_validation_split(job: Job) -> None:
    trained = METHODS["ivon_for_lora"].train(job, {})
    unseen: Any = None  # a validation split that nobody may look at
    each, labels = METHODS["ivon_for_lora_left_out"].calibration(job, trained, {}, unseen)
    assert each.shape == (job.samples, len(job.training_set), 3) and torch.isfinite(each).all()
    assert sorted(labels.tolist()) == sorted(job.training_set.labels.tolist())
    learned, order = METHODS["ivon_for_lora"].each(job, trained, {}, job.training_set), job.training_set.labels
    assert metrics.evaluate(each.mean(0), labels).nll > metrics.evaluate(learned.mean(0), order).nll


def test_what_is_tried_beside_for_lora(job: Job) -> None:
    """Each trains in another way, and does what its title says."""
    plain = METHODS["ivon_for_lora"].train(job, {})
    mean = job.weights()
    found = {}
    for method in ("ivon_annealed", "ivon_averaged", "ivon_root", "ivon_matrices"):
        job.restart()
        found[method] = METHODS[method].train(job, {})
        assert not torch.equal(job.weights(), mean)
        each = METHODS[method].each(job, found[method], {}, job.training_set)
        assert torch.isfinite(each).all()
    assert found["ivon_annealed"]["ess"].item() == pytest.approx(4 * plain["ess"].item(), rel=1e-5)
    assert found["ivon_averaged"]["ess"] == plain["ess"]
    assert found["ivon_root"]["ess"].item() == pytest.approx(955 * len(job.training_set) ** 0.5)
    matrices = METHODS["ivon_matrices"].optimizer(job, {})
    refit = METHODS["ivon_matrices"].watch(job, matrices)
    refit(7)
    assert {group["weight_decay"] for group in matrices.param_groups} == {0.0}
    refit(8)
    for group in matrices.param_groups:  # the prior's variance is the mean square of a draw from the posterior
        state = matrices.state[group["params"][0]]
        square = state["mean"].square() + 1 / (group["ess"] * state["hess"])
        assert 1 / (group["ess"] * group["weight_decay"]) == pytest.approx(square.mean().item(), rel=1e-5)


def test_what_a_method_takes_is_counted() -> None:
    work = {name: METHODS[name].work(10) for name in LONG_METHODS}
    assert work["adamw"] == (1, 1) and work["mc_dropout"] == (0, 10) and work["ensemble"] == (4, 5)
    assert work["ivon_for_lora"] == (1, 10) and work["ivon_for_lora_mean"] == (0, 1) and work["blob"] == (1, 10)


# ---- the study -------------------------------------------------------------------------------------------------------


def study(tiny_model: Path, out: Path, *more: str) -> dict[str, Any]:
    given = ["--size=long", "--quick", "--steps=3", "--device=cpu", f"--model={tiny_model}", f"--out={out}", *more]
    result = CliRunner().invoke(app, ["quality", *given])
    assert result.exit_code == 0, result.output
    assert "hours of one core" in result.output
    found: dict[str, Any] = json.loads((out / "quality.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("study")
    tasks = "--tasks=vader_nyt,arc_easy,openbookqa"
    return out, study(tiny_model, out, tasks, "--seeds=2", f"--methods={','.join(STUDIED)}", "--search")


def test_rows_are_averages_of_the_first_samples_with_and_without_a_temperature(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    out, record = finished
    for cell in record["cells"]:
        assert cell["error"] is None
        counts = [1] if cell["method"] in ("adamw", "ivon_for_lora_mean") else [1, 2, 3]
        kinds = [False] if cell["method"] == "ivon_for_lora_left_out" else [True, False]
        assert [row[0] for row in cell["rows"]] == [count for count in counts for _ in kinds]
        assert [row[1] is None for row in cell["rows"]] == kinds * len(counts)
    (path,) = (out / "cells" / "judged" / "vader_nyt" / "ivon_for_lora").rglob("0.safetensors")
    saved = load_file(path)
    assert set(saved) == {CALIBRATION, *(f"vader_{name}" for name in ("nyt", "movie", "amazon", "tweets"))}
    examples = data.load_dataset(TASKS["vader_nyt"], split="test", train_size=1, test_size=20, max_words=10).test
    labels = torch.tensor([example.label for example in examples])
    (cell,) = (c for c in record["cells"] if (c["task"], c["method"], c["seed"]) == ("vader_nyt", "ivon_for_lora", 0))
    for samples, temperature, domains in cell["rows"]:
        average = saved["vader_nyt"][:samples].double().mean(0)
        if temperature is not None:
            average = (average.log() / temperature).softmax(1)
        scores = dict(zip(record["metrics"], domains[0], strict=True))
        assert scores["nll"] == pytest.approx(metrics.evaluate(average, labels).nll, abs=2e-5)


def test_a_temperature_costs_no_accuracy_and_no_forward_pass(finished: tuple[Path, dict[str, Any]]) -> None:
    for cell in finished[1]["cells"]:
        expected = {"adamw": 1, "ivon_for_lora_mean": 1}.get(cell["method"], 3)
        assert cell["cost"]["passes"] == expected
        if cell["method"] == "ivon_for_lora_left_out":
            continue  # it has the base's rows, scaled
        for plain, scaled in zip(cell["rows"][::2], cell["rows"][1::2], strict=True):
            assert [scores[0] for scores in plain[2]] == [scores[0] for scores in scaled[2]]


def test_hyperparameters_are_chosen_on_the_first_task_of_a_kind(finished: tuple[Path, dict[str, Any]]) -> None:
    out, record = finished
    assert sorted(path.name for path in (out / "cells" / "search").iterdir()) == ["arc_easy", "vader_nyt"]
    found = record["hyperparameters"]
    assert found["openbookqa"]["adamw"]["chosen"] == found["arc_easy"]["adamw"]["chosen"]
    tried = found["vader_nyt"]["adamw"]["tried"]
    assert [entry["hyper"] for entry in tried] == [dict(each) for each in METHODS["adamw"].long_candidates]
    assert found["vader_nyt"]["ivon_for_lora"]["tried"] == []
    for task in ("vader_nyt", "arc_easy", "openbookqa"):
        assert found[task]["ivon_adamw_rate"]["chosen"] == found[task]["adamw"]["chosen"]


def test_seeds_of_the_first_task_come_first(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is cut off has whole seeds of one task."""
    record = study(tiny_model, tmp_path, "--tasks=vader_nyt,arc_easy", "--methods=adamw", "--seeds=2")
    assert [(cell["task"], cell["seed"]) for cell in record["cells"]] == [
        (task, seed) for task in ("vader_nyt", "arc_easy") for seed in (0, 1)
    ]
    cells = tmp_path / "cells"
    assert len(list(cells.rglob("*.safetensors"))) == 8
    before = (tmp_path / "report.md").read_text()
    assert study(tiny_model, tmp_path, "--tasks=vader_nyt,arc_easy", "--methods=adamw", "--seeds=2")["finished"]
    assert "Not finished" not in before


def test_a_record_is_enough_to_go_on_from(
    finished: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    """What it has is not done again, and what comes is put to it: cells are too large to be kept by everyone."""
    before = json.loads(json.dumps(finished[1]))
    kept = [cell for cell in before["cells"] if (cell["task"], cell["method"]) != ("openbookqa", "tfb")]
    for cell in kept:
        cell["cost"]["train_seconds"] = 12345.0  # no training here takes so long
    (tmp_path / "quality.json").write_text(json.dumps({**before, "cells": kept}))
    methods = ("tfb", "mc_dropout", "ivon_long_samples")  # the last one needs another, which is not asked for
    tasks = ("openbookqa", "vader_movie")
    asked = (f"--tasks={','.join(tasks)}", f"--methods={','.join(methods)}", "--seeds=1", "--search")
    record = study(tiny_model, tmp_path, *asked)
    cells = {(cell["task"], cell["method"], cell["seed"]): cell for cell in record["cells"]}
    earlier = {(cell["task"], cell["method"], cell["seed"]): cell for cell in kept}
    assert {key: cells[key] for key in earlier} == earlier
    new = {*(("openbookqa", name, 0) for name in ("tfb", "mc_dropout"))}
    new |= {("vader_movie", name, 0) for name in ("adamw", "tfb", "mc_dropout")}
    new |= {(task, name, 0) for task in tasks for name in ("ivon_long", "ivon_long_samples")}
    assert cells.keys() - earlier.keys() == new
    before_it = next(c for c in before["cells"] if (c["task"], c["method"], c["seed"]) == ("openbookqa", "tfb", 0))
    assert cells["openbookqa", "tfb", 0]["rows"] == before_it["rows"]
    trained = sorted(path.parent.name for path in (tmp_path / "cells" / "trained").rglob("*.safetensors"))
    assert len(trained) == 4 and not (tmp_path / "cells" / "search").exists()
    assert record["settings"]["tasks"] == ["vader_nyt", "arc_easy", "openbookqa", "vader_movie"]
    assert record["settings"]["seeds"] == [0, 1] and record["settings"]["methods"] == [*STUDIED, *methods[1:]]
    assert record["hyperparameters"]["arc_easy"] == before["hyperparameters"]["arc_easy"]
    assert record["earlier"] == [before["environment"]]
    text = (tmp_path / "report.md").read_text()
    assert "vader_movie, seed 1: all methods have not run" in text and "openbookqa, seed 1: tfb" in text
    (line,) = (line for line in text.splitlines() if line.startswith("- arc_easy, seed 0: "))
    assert all(name in line for name in methods[1:])


def test_a_record_of_another_study_is_not_written_over(
    finished: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "quality.json"
    given = ["quality", "--size=long", "--quick", "--search", f"--model={tiny_model}", f"--out={tmp_path}"]
    other = {**finished[1], "settings": {**finished[1]["settings"], "load_in_8bit": True}}
    for content, reason in (
        (json.dumps(other), "other load_in_8bit"),
        (json.dumps({"schema": 1}), "record of another kind"),
        ("{", "Cannot read the record"),
    ):
        path.write_text(content)
        result = CliRunner().invoke(app, [*given, "--steps=3"])
        assert result.exit_code == 2 and reason in " ".join(result.output.split())
        assert path.read_text() == content


def test_the_report_says_who_wins_and_what_is_missing(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, record = finished
    text = (out / "report.md").read_text()
    for heading in ("## Wins", "## vader_nyt", "## Over the tasks", "## Hyperparameters", "validation splits of"):
        assert heading in text
    assert "Not finished" not in text and (out / "passes.png").stat().st_size > 10_000
    kept = [cell for cell in record["cells"] if (cell["task"], cell["seed"]) != ("openbookqa", 1)]
    write_report({**record, "cells": kept}, tmp_path)
    assert "openbookqa, seed 1: all methods have not run" in (tmp_path / "report.md").read_text()


def test_a_row_with_a_temperature_alone_meets_rivals_without_and_with_one(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, record = finished
    ways, name = Ways(record), "ivon_for_lora_left_out"
    row = Row(name, 3, True)
    assert ways.at(name, 3, False) == ways.at(name, 10, True) == row and ways.has(row)
    lines = ways.differences("vader_nyt", name).splitlines()
    assert sum("3 passes, scaled less AdamW |" in line for line in lines) == 1
    assert sum("3 passes, scaled less AdamW, scaled |" in line for line in lines) == 1
    assert ways.scores("vader_nyt").count("examples left out") == 1
    (line,) = (line for line in ways.at_a_glance("vader_nyt", IN, (3,)).splitlines() if "left out" in line)
    assert [cell.strip() == "-" for cell in line.split("|")[2:7]] == [False, True, False, True, False]
    base = ways.score("vader_nyt", IN, Row("ivon_for_lora", 3, False), "accuracy")
    assert ways.score("vader_nyt", IN, row, "accuracy") == base


SAMPLING = ("ivon_for_lora", "ivon_annealed")


def made(values: dict[str, Callable[[int], float]]) -> dict[str, Any]:
    """A record of three seeds with these errors by method; IVON's has two numbers of passes."""
    cells = []
    for method, value in values.items():
        for seed in range(3):
            rows = []
            for count in (1, 2) if method in SAMPLING else (1,):
                scores = dict.fromkeys(METRICS, value(seed) / count)
                domain = {"task": "arc_easy", "shift": False, "examples": 100, "vote_entropy": None, "scores": scores}
                rows += [{"samples": count, "temperature": t, "domains": [domain]} for t in (None, 2.0)]
            keys = ("extra_parameters", "passes", "predict_ms_per_example")
            cost = dict.fromkeys((*keys, "train_seconds", "fit_seconds", "tune_seconds"), 1.0)
            cost["passes"] = float(len(rows) // 2)
            about = {"task": "arc_easy", "method": method, "seed": seed, "hyper": {}, "dials": {}, "error": None}
            cells.append({**about, "cost": cost, "rows": rows})
    methods = {name: {"title": name, "source": "", "base": None, "ablation": False} for name in values}
    amounts = {"shares": True, "choice": []}
    kept = {"tasks": ["arc_easy"], "seeds": [0, 1, 2], "size": "long", "model": None, "amounts": amounts}
    return compact({"methods": methods, "hyperparameters": {}, "cells": cells, "settings": kept})


def test_wins_are_counted_at_equal_passes() -> None:
    noise = (0.0, 0.01, -0.01)
    ways = Ways(made({"adamw": lambda s: 0.6 + noise[s], "ivon_for_lora": lambda s: 0.8 - noise[s]}))
    one, two = Row("ivon_for_lora", 1, False), Row("ivon_for_lora", 2, False)
    rival = ways.at("adamw", 2, False)
    assert rival == Row("adamw", 1, False)
    # of one pass the accuracy alone is better, of two, whose scores are half as large, all but the accuracy
    assert ways.tally(one, rival) == (1, 3, 0)
    assert ways.tally(two, rival) == (3, 1, 0)
    assert ways.at("ivon_for_lora", 1, True) == Row("ivon_for_lora", 1, True)
    unsure = Ways(made({"adamw": lambda s: 0.6, "ivon_for_lora": lambda s: 0.6 + noise[s]}))
    assert unsure.tally(one, rival) == (0, 0, 4)


def test_the_table_at_a_glance_has_a_line_for_each_number_of_passes() -> None:
    ways = Ways(made({"adamw": lambda s: 0.6, "ivon_for_lora": lambda s: 0.8}))
    lines = [line.strip("| ").split(" | ") for line in ways.at_a_glance("arc_easy", IN, (1, 2)).splitlines()]
    titles, *means = zip(*([cell.split(" ±")[0] for cell in line] for line in lines[2:]), strict=True)
    assert lines[0][0] == "accuracy" and titles == ("adamw", "ivon_for_lora", "ivon_for_lora (2)")
    assert ways.at_a_glance("arc_easy", IN, (1,), ["adamw"]).count("\n") == 2
    assert means == [("0.600", "**0.800", "0.400"), *[("0.600", "0.800", "**0.400")] * 4]


def test_variants_are_compared_with_what_they_vary() -> None:
    noise = (0.0, 0.01, -0.01)
    record = made(
        {
            "adamw": lambda s: 0.6,
            "ivon_for_lora": lambda s: 0.8 + noise[s],
            "ivon_for_lora_mean": lambda s: 0.79,
            "ivon_annealed": lambda s: 0.4 + noise[s],
        }
    )
    record["methods"]["ivon_for_lora_mean"]["base"] = "ivon_for_lora"
    record["methods"]["ivon_annealed"]["ablation"] = True
    ways = Ways(record)
    assert ways.variants == ["ivon_annealed", "ivon_for_lora_mean"] and ways.rivals == ["adamw"]
    assert ways.ours == ["ivon_for_lora", "ivon_for_lora_mean"] and "annealed" not in ways.wins()
    head, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in ways.tried("arc_easy", (2,)).splitlines()
    )
    assert head == ["less ivon_for_lora", "accuracy", "NLL", "NLL, scaled", "ECE", "ECE, scaled"]
    # Two samples have half the score, and a mean is compared with one; a difference without an error is decided.
    assert lines == [
        ["ivon_annealed (2)", "-0.200 ± 0.000 ✗", *["-0.200 ± 0.000 ✓"] * 4],
        ["ivon_for_lora_mean", *["-0.010 ± 0.006"] * 5],
    ]
    del record["methods"]["ivon_for_lora"]
    kept = [cell for cell in record["cells"] if cell["method"] != "ivon_for_lora"]
    assert Ways({**record, "cells": kept}).variants == []


def test_a_record_of_passes_reads_as_methods_of_their_own() -> None:
    record = made({"adamw": lambda s: 0.5, "ivon_for_lora": lambda s: 0.25})
    found = expand(record)
    names = ["adamw", "adamw+T", *(f"ivon_for_lora@{n}{t}" for n in (1, 2) for t in ("", "+T"))]
    assert list(found["methods"]) == names
    assert found["methods"]["ivon_for_lora@2+T"]["title"] == "ivon_for_lora, 2 passes, scaled"
    costs = {cell["method"]: cell["cost"]["passes"] for cell in found["cells"]}
    assert costs["ivon_for_lora@1"] == 0.5 * costs["ivon_for_lora@2"]
    with pytest.raises(ValueError, match="schema 1"):
        expand({**record, "schema": 1})


# ---- settings --------------------------------------------------------------------------------------------------------


def resolved(**changes: Any) -> settings.Settings:
    options = {"size": "long", "tasks": None, "seeds": None, "steps": None, "threads": None, "out": None}
    more = {"model": None, "load_in_8bit": False, "device": "cpu"}
    return settings.resolve(**{**options, **more, **changes})


def test_a_long_study_has_its_tasks_methods_and_budget() -> None:
    found = resolved()
    assert found.tasks == LONG_TASKS and found.seeds == (0, 1, 2) and found.search
    chosen = select(found)
    assert set(chosen) == set(LONG_METHODS)
    for method in chosen.values():
        assert len(method.candidates) <= settings.BUDGET and len(method.dials) <= settings.DIAL_BUDGET
    for task in LONG_TASKS:
        recipe = settings.sized(TASKS[task], found.amounts).recipe
        assert recipe.steps * recipe.batch_size >= 10 * (recipe.train_size or 0)
        assert (recipe.test_size or 0) >= 400
        sizes: dict[str, Any] = {name: getattr(recipe, name) for name in ("train_size", "test_size", "max_words")}
        data.load_dataset(TASKS[task], split="test", **sizes)


def test_other_sizes_record_and_identify_themselves_as_before() -> None:
    assert set(SIZES["laptop"].record()) == {
        *("steps", "train_size", "validation_size", "test_size", "shift_size", "samples", "search_samples", "seeds"),
        *("max_words", "batch_size"),
    }
    assert resolved(size=None, tasks="vader_nyt").tasks == ("vader_nyt",)
    with pytest.raises(UserError, match="--quick is --size quick"):
        resolved(size="full", quick=True)


def test_a_mean_of_fewer_seeds_says_so() -> None:
    record = made({"adamw": lambda s: 0.6 + s / 10, "ivon_for_lora": lambda s: 0.6 + s / 10})
    kept = [cell for cell in record["cells"] if (cell["method"], cell["seed"]) != ("adamw", 2)]
    ways = Ways({**record, "cells": kept})
    for table in (ways.at_a_glance("arc_easy", IN, (2,)), ways.scores("arc_easy")):
        assert "adamw, 2 of 3 seeds" in table.replace(", scaled", "") and table.count("seeds") <= 2
        assert "ivon_for_lora" in table and "of 3 seeds" not in table.partition("ivon_for_lora")[2]
    assert "of 3 seeds" not in Ways(record).scores("arc_easy")
