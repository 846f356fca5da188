"""``python -m benchmarks quality`` and ``recipe`` on a tiny model: what is done once, chosen, resumed and refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner, Result

from benchmarks import UserError
from benchmarks.__main__ import app
from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality import methods as registry
from benchmarks.quality import pictures, recipe_report, settings
from benchmarks.quality.method import Hyper, Job, Method, State
from benchmarks.quality.methods.adamw import AdamW
from benchmarks.quality.recipe import BETA2, EVERYWHERE, NEAR, Plan, Proposals, parse
from benchmarks.quality.workshop import Cells, key_of
from tests.support.finetune_model import save_tiny_model

# PEFT asks transformers by a name that transformers is about to change.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
DOMAINS = ["vader_nyt", "vader_movie", "vader_amazon", "vader_tweets"]


class Failing(AdamW):
    """A method that cannot be trained."""

    def train(self, job: Job, hyper: Hyper) -> State:
        raise RuntimeError("no luck today")


class Careless(AdamW):
    """A method that leaves the weights changed."""

    @torch.no_grad()
    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        job.parameters[0].add_(1.0)
        return super().predict(job, state, hyper, examples)


ALL = registry.all_methods()
METHODS: dict[str, Method] = {
    method.name: replace(method, candidates=method.candidates[:2])
    for method in (
        ALL["adamw"],
        ALL["ivon"],
        ALL["ivon_frozen"],
        Failing("failing", "failing", "none"),
        Careless("careless", "careless", "none", candidates=ALL["adamw"].candidates),
        ALL["ivon_samples"],
        ALL["ivon_tempered"],
    )
}
QUICK = ("--quick", "--steps=3", "--device=cpu")


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def study(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished study of one seed: its folder and what it printed."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.quality.study.all_methods", lambda: METHODS)
        result = invoke("quality", *QUICK, "--search", f"--model={tiny_model}", f"--out={out}")
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture
def again(
    study: tuple[Path, str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs the same study in a copy of its folder, with other options."""
    monkeypatch.setattr("benchmarks.quality.study.all_methods", lambda: METHODS)
    shutil.copytree(study[0], tmp_path / "study")

    monkeypatch.setattr(pictures, "of_view", lambda summary, task: ())

    def run(*options: str) -> Result:
        given = ["--search", f"--model={tiny_model}", f"--out={tmp_path / 'study'}", *options]
        return invoke("quality", *QUICK, *given)

    return run


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the cells that are done while a test runs."""
    done: list[str] = []
    get = Cells.get

    def remember(self: Cells, names: tuple[str, ...], compute: Callable[[], Any]) -> Any:
        def computed() -> Any:
            done.append("/".join(names))
            return compute()

        return get(self, names, computed)

    monkeypatch.setattr(Cells, "get", remember)
    return done


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quality.json").read_text())
    return found


def cells(out: Path, method: str) -> list[dict[str, Any]]:
    return [cell for cell in record(out)["cells"] if cell["method"] == method]


def test_every_method_is_judged_in_distribution_under_shift_and_against_votes(study: tuple[Path, str]) -> None:
    found = record(study[0])
    assert [cell["method"] for cell in found["cells"]] == list(METHODS)
    for cell in found["cells"]:
        if cell["error"] is None:
            assert [domain["task"] for domain in cell["domains"]] == DOMAINS
            assert [domain["shift"] for domain in cell["domains"]] == [False, True, True, True]
            for domain in cell["domains"]:
                assert 0 <= domain["scores"]["accuracy"] <= 1
                assert domain["scores"]["vote_cross_entropy"] >= domain["vote_entropy"]
                assert sum(domain["reliability"]["counts"]) == domain["examples"]
    json.dumps(found, allow_nan=False)
    assert found["settings"]["amounts"]["steps"] == 3
    assert "3 training steps" in (study[0] / "report.md").read_text()


def test_costs_are_measured(study: tuple[Path, str]) -> None:
    samples = settings.SIZES["quick"].samples
    passes = {"adamw": 1, "ivon": 1, "ivon_frozen": samples, "ivon_samples": samples, "ivon_tempered": samples}
    weights = cells(study[0], "ivon")[0]["cost"]["extra_parameters"]
    for method, expected in passes.items():
        (cell,) = cells(study[0], method)
        cost = cell["cost"]
        assert cost["passes"] == expected
        assert cost["extra_parameters"] == (0 if method == "adamw" else weights)
        assert cost["train_seconds"] > 0 and cost["predict_ms_per_example"] > 0
        assert cost["train_peak_mb"] is None or cost["train_peak_mb"] >= 0
    shared = {cells(study[0], name)[0]["cost"]["train_seconds"] for name in ("ivon", "ivon_samples", "ivon_tempered")}
    assert len(shared) == 1  # one training serves them all


def test_hyperparameters_are_those_of_the_best_likelihood_on_the_validation_split(study: tuple[Path, str]) -> None:
    found = record(study[0])["hyperparameters"]["vader_nyt"]
    assert set(found) == {"adamw", "ivon", "ivon_frozen", "failing", "careless"}
    for name in ("adamw", "ivon", "ivon_frozen"):
        tried = found[name]["tried"]
        assert [entry["hyper"] for entry in tried] == [dict(hyper) for hyper in METHODS[name].candidates]
        best = min(tried, key=lambda entry: entry["scores"]["nll"])
        assert found[name]["chosen"] == best["hyper"]
        assert len({entry["scores"]["nll"] for entry in tried}) > 1
        assert cells(study[0], name)[0]["hyper"] == best["hyper"]
    written = json.loads((study[0] / "hyperparameters.json").read_text())
    assert written["vader_nyt"]["ivon"] == found["ivon"]["chosen"]


def test_a_dial_is_chosen_for_the_trained_model(study: tuple[Path, str]) -> None:
    (cell,) = cells(study[0], "ivon_tempered")
    assert cell["dials"] in [dict(dial) for dial in METHODS["ivon_tempered"].dials]
    assert cells(study[0], "ivon_samples")[0]["dials"] == {}


def test_a_failing_method_is_a_row_and_the_study_goes_on(study: tuple[Path, str]) -> None:
    (failed,) = cells(study[0], "failing")
    assert "RuntimeError: no luck today" in failed["error"]
    assert failed["domains"] == [] and failed["cost"] is None
    (careless,) = cells(study[0], "careless")
    assert "did not leave the adapter's weights as they were" in careless["error"]
    assert "no luck today" in study[1]


def test_finished_parts_are_not_done_again_and_failed_ones_are(
    again: Callable[..., Result], study: tuple[Path, str], tmp_path: Path, worked: list[str]
) -> None:
    assert again().exit_code == 0
    assert {name.split("/")[2] for name in worked} == {"failing", "careless"}
    before, after = record(study[0]), record(tmp_path / "study")
    assert [cell for cell in before["cells"] if cell["error"] is None] == [
        cell for cell in after["cells"] if cell["error"] is None
    ]
    worked.clear()
    result = again("--seeds=2", "--methods=ivon_samples")
    assert result.exit_code == 0, result.output
    hyper = key_of(cells(tmp_path / "study", "ivon_samples")[0]["hyper"])
    expected = ["trained/vader_nyt/ivon", "judged/vader_nyt/ivon", "judged/vader_nyt/ivon_samples"]
    assert worked == [f"{name}/{hyper}/1" for name in expected]


def test_new_candidates_have_what_they_change_done_again(
    again: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worked: list[str]
) -> None:
    (cell,) = cells(tmp_path / "study", "adamw")
    kept = [hyper for hyper in METHODS["adamw"].candidates if hyper != cell["hyper"]]
    others = (*kept, {"lr": 1e-4})
    monkeypatch.setitem(METHODS, "adamw", replace(METHODS["adamw"], candidates=others))
    result = again("--methods=adamw")
    assert result.exit_code == 0, result.output
    (after,) = cells(tmp_path / "study", "adamw")
    assert after["hyper"] in others and after["domains"] != cell["domains"]
    hyper = key_of(after["hyper"])
    expected = [f"search/vader_nyt/adamw/{key_of({'lr': 1e-4})}", f"trained/vader_nyt/adamw/{hyper}/0"]
    assert worked == [*expected, f"judged/vader_nyt/adamw/{hyper}/0"]


def test_an_interrupt_keeps_what_is_finished(
    again: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    train = AdamW.train

    def interrupted(self: AdamW, job: Job, hyper: Hyper) -> State:
        nonlocal seen
        seen += 1
        if seen == 2:
            job.guard.requested = True
        return train(self, job, hyper)

    shutil.rmtree(tmp_path / "study")
    monkeypatch.setattr(AdamW, "train", interrupted)
    result = again("--methods=adamw")
    assert result.exit_code == 130, result.output
    assert "the same command goes on" in result.output
    done = [path.stem for path in (tmp_path / "study").rglob("*.safetensors")]
    assert done == [key_of(METHODS["adamw"].candidates[0])]
    assert record(tmp_path / "study")["finished"] is False


def test_the_same_seed_gives_the_same_numbers_without_the_search(again: Callable[..., Result], tmp_path: Path) -> None:
    before = cells(tmp_path / "study", "ivon_samples")[0]["domains"]
    given = tmp_path / "given.json"
    shutil.copy(tmp_path / "study" / "hyperparameters.json", given)
    shutil.rmtree(tmp_path / "study")
    result = again("--no-search", f"--hyperparameters={given}", "--methods=ivon_samples")
    assert result.exit_code == 0, result.output
    assert cells(tmp_path / "study", "ivon_samples")[0]["domains"] == before
    assert record(tmp_path / "study")["hyperparameters"]["vader_nyt"]["ivon"]["from"] == "file"


def test_a_folder_of_another_study_is_refused(again: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "study" / "study.json"
    identity = json.loads(path.read_text())
    identity["amounts"]["samples"] = 11
    path.write_text(json.dumps(identity))
    result = again()
    assert result.exit_code == 2
    assert "holds a study with other amounts" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=huge"], "Unknown size 'huge'"),
        (["--tasks=nonsense"], "Unknown task 'nonsense'"),
        (["--methods=nonsense"], "Unknown method 'nonsense'"),
        (["--seeds=0"], "--seeds must be between 1"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--quick", "--size=full"], "--quick is --size quick"),
        (["--search", "--hyperparameters=x.json"], "use one of the two"),
        (["--hyperparameters=missing.json"], "Cannot read the hyperparameters in missing.json"),
    ],
)
def test_mistakes_end_in_one_sentence(options: list[str], message: str, tmp_path: Path) -> None:
    result = invoke("quality", *options, f"--out={tmp_path / 'out'}")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_methods_stay_within_the_budget() -> None:
    assert {"adamw", "ivon", "ivon_samples", "ivon_tempered", "ivon_pruned", "ivon_frozen"} <= set(ALL)
    for name, method in ALL.items():
        assert method.name == name
        assert method.title and method.source
        assert 1 <= len(method.candidates) <= settings.BUDGET
        assert 1 <= len(method.dials) <= settings.DIAL_BUDGET
    assert len({method.title for method in ALL.values()}) == len(ALL)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", r"mine_\d\.py must name its methods in METHODS"),
        ('METHODS = (AdamW("one", "one", "none"), AdamW("one", "two", "none"))', "Two methods have the name one"),
        ('METHODS = (AdamW("one", "one", "none", base="two"),)', "one has the base two"),
    ],
)
def test_a_file_joins_by_its_table(
    table: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    names = [f"mine_{number}" for number in range(2)]
    for name, text in zip(names, ('METHODS = (AdamW("mine", "mine", "none"),)', table), strict=True):
        (tmp_path / f"{name}.py").write_text(f"from benchmarks.quality.methods.adamw import AdamW\n{text}\n")
        request.addfinalizer(lambda name=name: sys.modules.pop(f"{registry.__name__}.{name}", None))
    monkeypatch.setattr(registry, "__path__", [str(tmp_path)])
    with pytest.raises(UserError, match=message):
        registry.all_methods()
    (tmp_path / "mine_1.py").unlink()
    assert list(registry.all_methods()) == ["mine"]


def test_a_cell_is_for_one_process_and_free_when_it_dies(tmp_path: Path) -> None:
    store = Cells(tmp_path, {})
    (tmp_path / "cells" / "one").mkdir()
    path = str(tmp_path / "cells" / "one" / "x.lock")
    hold = f"import filelock; lock = filelock.FileLock({path!r}); lock.acquire(); print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold], stdin=pipe, stdout=pipe) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with pytest.raises(Timeout):
            store.get(("one", "x"), lambda: ({"error": None}, {}))
        assert store.read("one", "x") is None
        owner.kill()
    assert store.get(("one", "x"), lambda: ({"error": None, "found": 1}, {"t": torch.ones(2)}))["found"] == 1
    assert store.get(("one", "x"), lambda: ({"error": "again"}, {}))["found"] == 1
    assert torch.equal(store.tensors("one", "x")["t"], torch.ones(2))


def proposals(folder: Path) -> Proposals:
    return Proposals(folder, "task", FileLock(folder / "lock"))


def test_proposals_fill_the_space_and_grow_by_more(tmp_path: Path) -> None:
    few = proposals(tmp_path).draw(EVERYWHERE, 8)
    many = proposals(tmp_path).draw(EVERYWHERE, 64)  # another process, or another day
    assert many[:8] == few and proposals(tmp_path).draw(EVERYWHERE, 8) == few
    for name, low, high in (("lr", 0.1, 3.0), ("hess_init", 1e-4, 1.0)):
        logs = sorted(math.log(hyper[name]) for hyper in many)
        ideal = [math.log(low) + (i + 0.5) / 64 * math.log(high / low) for i in range(64)]
        assert max(abs(a - b) for a, b in zip(logs, ideal, strict=True)) < 0.1 * math.log(high / low)
    assert {hyper["beta2"] for hyper in few} == set(BETA2)


def test_refinement_is_where_the_best_are(tmp_path: Path) -> None:
    """With a loss that has its minimum at a learning rate of 1: a Sobol point is within a factor 2 with 0.41."""
    search = proposals(tmp_path)
    everywhere = search.draw(EVERYWHERE, 32)
    runs = [{"hyper": hyper, "samples": {"2": {"nll": abs(math.log(hyper["lr"]))}}} for hyper in everywhere]
    search.tell(runs)
    search.tell(runs)  # by another process too
    near = search.draw(NEAR, 16)
    close = [sum(0.5 <= hyper["lr"] <= 2.0 for hyper in found) / len(found) for found in (everywhere, near)]
    assert close[0] < 0.5 and close[1] > 0.7
    assert search.draw(NEAR, 16) == near


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_tried", "draw_confirmed"):
        monkeypatch.setattr(recipe_report, name, lambda record: Figure())


def test_the_recipe_tries_confirms_and_freezes(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [
        "--size=quick",
        "--steps=3",
        "--trials=2",
        "--refine=1",
        "--best=1",
        "--seeds=2",
        f"--model={tiny_model}",
        f"--out={tmp_path}",
    ]
    result = invoke("recipe", *arguments, "--device=cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "recipe.json").read_text())
    assert len(found["tried"]) == 1 + 2 + 1
    best = min(found["tried"], key=lambda run: run["samples"]["2"]["nll"])["hyper"]
    learned = [run for run in found["confirmed"] if run["hyper"]["beta2"] == best["beta2"]]
    held = [run for run in found["confirmed"] if run not in learned]
    assert [run["seed"] for run in learned] == [run["seed"] for run in held] == [1001, 1002]
    assert {run["hess_over_init"]["0"] for run in held} == {run["hess_over_init"]["1"] for run in held}
    assert all(run["hess_over_init"]["0"] < run["hess_over_init"]["1"] for run in learned)
    for run in found["confirmed"]:
        # As many samples of the same noise, in batches of another size, by which some CPUs round a float32 product.
        assert run["temperatures"]["1"] == pytest.approx(run["samples"]["2"], abs=1e-6)
    assert (tmp_path / "recipe.md").read_text().count("|") > 100
    assert (tmp_path / "recipe_tried.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_pictures")
def test_the_recipe_tries_given_settings_instead_of_searching(tiny_model: Path, tmp_path: Path) -> None:
    given = ["2e-3,0.05,0.01,0.99", "5e-4,0.02,0.04,0.999"]
    arguments = ["--size=quick", "--steps=3", "--best=0", *(f"--try={text}" for text in given), f"--out={tmp_path}"]
    result = invoke("recipe", *arguments, f"--model={tiny_model}", "--device=cpu")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "recipe.json").read_text())
    found = [(run["hyper"]["lr"], run["hyper"]["ess"], run["hyper"]["beta2"]) for run in record["tried"][1:]]
    assert found == [(2.0, 4.0e4, 0.99), (0.5, 6.2e4, 0.999)]
    assert all(set(run["samples"]) == {"1", "2", "4", "8", "16"} for run in record["tried"])
    assert not record["confirmed"]
    report = (tmp_path / "recipe.md").read_text()
    assert "3 steps" in report and f"--best 0 --try {given[0]} --try {given[1]}" in report


@pytest.mark.parametrize(
    "text", ["1e-3,0.06,0.04", "a,b,c,d", "0,0.06,0.04,0.9", "1,1,inf,0.9", "1,1,1,1", "nan,1,1,0"]
)
def test_given_settings_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--try"):
        parse(text)


def test_a_plan_must_try_something() -> None:
    assert Plan(0, -1, 0, ("1e-3,0.06,0.04,0.999",)).given
    for plan in ((0, 0, 1), (1, 0, 0), (1, -1, 1)):
        with pytest.raises(UserError, match="at least"):
            Plan(*plan)
