"""``python -m benchmarks evaluate`` on a tiny model: what it prints, writes and refuses, and that it repeats training's
numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import Result

from benchmarks.evaluate import run
from benchmarks.evaluate.cli import resolve
from benchmarks.finetune.tasks import TASKS
from tests.support.commands import ended_well, invoke, refused
from tests.support.finetune_model import save_tiny_model

# PEFT asks transformers by a name that transformers is about to change.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
SIZE, SAMPLES = 20, 2
DOMAINS = ["vader_nyt", "vader_movie", "vader_amazon", "vader_tweets"]


def evaluate(folder: Path, out: Path, **options: Any) -> Result:
    """With few samples and examples, unless `options` say otherwise; None leaves an option out."""
    return invoke("evaluate", folder, **{"out": out, "samples": SAMPLES, "test_size": SIZE, "device": "cpu", **options})


def record(out: Path) -> Any:
    return json.loads((out / "evaluate.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job's folder, after training IVON on rated sentences."""
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    out = tmp_path_factory.mktemp("trained")
    sizes = {"steps": 20, "train_size": 40, "test_size": SIZE, "samples": SAMPLES}
    ended_well(invoke("finetune", model=model, out=out, optimizer="ivon", device="cpu", **sizes))
    return out


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("evaluated") / "new"
    return out, ended_well(evaluate(trained / "ivon", out))


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained / "ivon", tmp_path / "adapter"))


def test_mean_and_samples_are_those_of_the_training_process(finished: tuple[Path, str], trained: Path) -> None:
    rows = json.loads((trained / "results.json").read_text())["rows"]
    mean, samples = record(finished[0])["domains"][0]["rows"][:2]
    assert (mean["name"], samples["name"]) == ("mean", "2 samples")
    for found, row in ((mean, rows[0]), (samples, rows[1])):
        expected = row["scores"]
        assert found["scores"]["accuracy"] == expected["accuracy"]
        for key in ("nll", "brier", "vote_kl"):
            # Batches of another size round differently: 2^-24 in each of a few dozen operations.
            assert found["scores"][key] == pytest.approx(expected[key], rel=1e-5)


def test_the_record_has_every_domain_and_method(finished: tuple[Path, str]) -> None:
    found = record(finished[0])
    assert found["finished"] is True
    assert [domain["task"] for domain in found["domains"]] == DOMAINS
    assert [domain["shift"] for domain in found["domains"]] == [False, True, True, True]
    heat, cut = found["dials"]
    assert (heat["dial"], cut["dial"]) == ("temperature", "pruned fraction")
    for dial in (heat, cut):
        best = dial["values"].index(dial["best"])
        assert dial["scores"][best]["nll"] == min(scores["nll"] for scores in dial["scores"])
    names = ["mean", "2 samples", f"tempered x{heat['best']:g}, 2 samples", f"pruned {cut['best']:.0%}, mean"]
    for domain in found["domains"]:
        assert domain["examples"] == SIZE
        assert [row["name"] for row in domain["rows"]] == names
        for row in domain["rows"]:
            assert row["scores"]["vote_cross_entropy"] >= domain["vote_entropy"]
            assert (row["mutual_information"] > 0) == ("samples" in row["name"])
    assert found["settings"]["task"] == "vader_nyt"
    assert found["settings"]["max_words"] == TASKS["vader_nyt"].recipe.max_words
    assert found["environment"]["versions"]["torch"] == torch.__version__


def test_a_table_for_each_domain(finished: tuple[Path, str]) -> None:
    _, output = finished
    headers = [line.split() for line in output.splitlines() if "NLL  " in line]
    assert headers == [["accuracy", "NLL", "ECE", "Brier", "AUROC", "votes"]] * 4
    titles = re.findall(r"^(\w+), (in distribution|under shift), 20 examples", output, re.MULTILINE)
    assert titles == [(name, "under shift" if name != "vader_nyt" else "in distribution") for name in DOMAINS]
    heat, cut = record(finished[0])["dials"]
    assert f"temperature {heat['best']:g}: the best NLL on 20 validation examples, of 0.1, 0.3, 1, 3, 10\n" in output
    assert f"pruned fraction {cut['best']:g}: the best NLL on 20 validation examples, of 0, 0.1, 0.3" in output
    assert max(len(line) for line in output.splitlines() if "samples " in line) <= 80


def test_pages_and_pictures(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert (out / "dials.png").read_bytes().startswith(b"\x89PNG")
    for name in DOMAINS:
        page = (out / name / "report.md").read_text()
        assert page.startswith(f"# {name}, ")
        for row in record(out)["domains"][DOMAINS.index(name)]["rows"]:
            assert f"| {row['name']} | {row['scores']['accuracy']:.3f} |" in page
        assert ("sigma.png" in page) == (name == "vader_nyt")  # the posterior is the same in every domain


def test_a_choice_task_has_no_votes_and_no_shift(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TEMPERATURES", (4.0,))
    monkeypatch.setattr(run, "FRACTIONS", (0.5,))
    settings = json.loads((adapter / "run.json").read_text())
    model = Path(shutil.copytree(settings["model"], tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    for letter in ("A", "B"):  # in the place of a word
        words[letter] = words.pop(next(word for word in words if word.islower() and len(word) > 8))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (adapter / "run.json").unlink()
    result = evaluate(adapter, tmp_path / "out", task="bigbench_strategyqa", model=model, split="validation")
    output = ended_well(result)
    found = record(tmp_path / "out")
    (domain,) = found["domains"]
    assert (domain["task"], domain["shift"], domain["vote_entropy"]) == ("bigbench_strategyqa", False, None)
    assert {row["scores"]["vote_kl"] for row in domain["rows"]} == {None}
    assert "votes" not in output
    # Where the dials are chosen, the rows repeat what they were chosen by.
    tempered, pruned = domain["rows"][2:]
    assert (tempered["name"], pruned["name"]) == ("tempered x4, 2 samples", "pruned 50%, mean")
    assert [tempered["scores"], pruned["scores"]] == [dial["scores"][0] for dial in found["dials"]]
    assert len({row["scores"]["nll"] for row in domain["rows"]}) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "nonsense"}, "{adapter} was trained on vader_nyt, not on nonsense."),
        ({"task": "vader_movie"}, "{adapter} was trained on vader_nyt, not on vader_movie."),
        ({"split": "train"}, "Unknown split 'train'; choose test or validation."),
        ({"samples": 0}, "--samples must be at least 1, not 0."),
        ({"samples": 2**16 + 1}, "--samples must be at most 65536"),
        ({"test_size": 0}, "--test-size must be at least 1, not 0."),
        ({"quick": True, "samples": 2}, "--quick decides --samples: give one of the two."),
        ({"device": "toaster"}, "Cannot use the device 'toaster'"),
        ({"model": "/a/missing/folder"}, "Cannot read the model '/a/missing/folder': there is no such file or folder."),
    ],
    ids=str,
)
def test_mistakes_end_in_one_sentence(adapter: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    result = invoke("evaluate", adapter, **{"out": tmp_path / "out", "device": "cpu", **options})
    refused(result, sentence.format(adapter=adapter))


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    refused(evaluate(tmp_path / "nothing", tmp_path), f"There is no adapter in {tmp_path / 'nothing'}: train one")


def test_a_folder_that_does_not_say_its_task(adapter: Path, tmp_path: Path) -> None:
    (adapter / "run.json").unlink()
    refused(evaluate(adapter, tmp_path), f"{adapter} does not say what it was trained on: give --task.")
    refused(evaluate(adapter, tmp_path, task="nonsense"), "Unknown task 'nonsense'; the tasks are vader_nyt, ")
    (adapter / "run.json").write_text("{")
    refused(evaluate(adapter, tmp_path), f"Cannot read {adapter / 'run.json'}: ")


def test_an_adapter_without_a_posterior(adapter: Path, tmp_path: Path) -> None:
    (adapter / "ivon_posterior.safetensors").unlink()
    refused(evaluate(adapter, tmp_path), "Cannot read the posterior: there is no ivon_posterior.safetensors in ")


def test_an_adapter_that_is_not_the_posteriors_mean(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: 2 * weight for name, weight in weights.items()}, path)
    refused(evaluate(adapter, tmp_path), "Cannot read the posterior: ")


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}], ids=str)
def test_another_model_than_the_trained_one(adapter: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    trained_on = json.loads((adapter / "run.json").read_text())["model"]
    config = transformers.AutoConfig.from_pretrained(trained_on, **changes)
    other = tmp_path / "other"
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(trained_on).save_pretrained(other)
    refused(evaluate(adapter, tmp_path, model=other), f"The adapter in {adapter} was not trained on this model: ")


def test_an_unwritable_out_ends_in_one_sentence(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(evaluate(adapter, tmp_path / "file"), f"Cannot write to --out {tmp_path / 'file'}: ")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_keeps_what_was_judged(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    handler = signal.getsignal(sent)
    judge = run.Evaluation._judge

    def interrupted(self: run.Evaluation, name: str, *rest: Any) -> None:
        if name == "vader_movie":
            os.kill(os.getpid(), sent)
        judge(self, name, *rest)

    monkeypatch.setattr(run.Evaluation, "_judge", interrupted)
    result = evaluate(trained / "ivon", tmp_path, samples=1, test_size=4)
    assert result.exit_code == 130
    assert result.stderr == f"Interrupted; what was judged so far is in {tmp_path}.\n"
    found = record(tmp_path)
    assert found["finished"] is False
    assert [domain["task"] for domain in found["domains"]] == ["vader_nyt"]
    assert (tmp_path / "vader_nyt" / "report.md").exists()
    assert signal.getsignal(sent) is handler


def test_an_adapter_of_the_papers_recipe_is_judged_by_its_prompts(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "run.json").write_text(json.dumps({"task": "arc_easy", "recipe": "paper", "prompts": "published"}))
    found, chosen = resolve(folder=tmp_path, task=None, quick=False, split="test", device="cpu", out=tmp_path)
    assert found.hub and (found.prompts, chosen.prompts, chosen.recipe) == ("published", "published", "paper")
