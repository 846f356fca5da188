"""``ivon-kernels posterior`` and ``convert``: the functions of the same names, without a model in memory."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ivon_kernels.commands.app import main
from ivon_kernels.noise import antithetic
from ivon_kernels.posterior import Posterior, merge
from ivon_kernels.posterior.exporting import MANIFEST
from tests.support.saved_posterior import assert_equal, save_lora, trained
from tests.support.tiny_llm import llama, lora_llama, make_trainer

WEIGHTS, POSTERIOR = "adapter_model.safetensors", "ivon_posterior.safetensors"

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter with its posterior."""
    save_lora(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    said = capsys.readouterr()
    error = without_bars(said.err)
    assert ended.value.code == 2 and said.out == "" and error.startswith("Error: ") and error.count("\n") == 1
    return error


def run(*arguments: str | Path | int, capsys: pytest.CaptureFixture[str]) -> str:
    main([*map(str, arguments)])
    said = capsys.readouterr()
    assert without_bars(said.err) == ""
    return said.out


def without_bars(text: str) -> str:
    """What is not one of transformers' progress bars."""
    return "".join(f"{line}\n" for line in re.split(r"[\r\n]+", text) if line and "%|" not in line)


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = Posterior.load(folder)
    text = run("posterior", "info", folder, capsys=capsys)
    found = dict(line.split(maxsplit=1) for line in text.splitlines())
    facts = {name: value.strip() for name, value in found.items()}
    assert facts == {"folder": str(folder), **posterior.facts()}
    text = run("posterior", "info", folder, "--tensors", capsys=capsys)
    for name, gaussian in posterior.items():
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        _, shape, sigma, _, kl = line.split()
        assert shape == "x".join(map(str, gaussian.mean.shape))
        assert float(sigma) == pytest.approx(gaussian.sigma.median().item(), rel=5e-3)  # of three digits
        assert float(kl) == pytest.approx(gaussian.kl, rel=5e-3)


def test_info_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = Posterior.load(folder)
    Posterior.load(folder).pruned(0.5).save_with_mean(folder.parent / "pruned")
    found = json.loads(run("posterior", "info", folder, "--json", capsys=capsys))
    assert (found["seed"], found["weights"], found["adapter"]) == (posterior.seed, posterior.numel, "default")
    assert found["tensors"].keys() == posterior.keys()
    for name, one in posterior.items():
        described = found["tensors"][name]
        assert (described["ess"], described["weight_decay"]) == (one.ess, one.weight_decay)
        assert described["sigma"] == one.sigma.median().item() and described["kl"] == one.kl
    pruned = json.loads(run("posterior", "info", folder.parent / "pruned", "--json", capsys=capsys))
    kls = [Posterior.load(folder.parent / "pruned")[name].kl for name in posterior]
    assert any(map(math.isinf, kls))  # no number of JSON
    assert [each["kl"] for each in pruned["tensors"].values()] == [None if math.isinf(kl) else kl for kl in kls]


def test_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = Posterior.load(folder)
    lines = run("posterior", "sample", folder, "-n", "2", "--first", "3", capsys=capsys).splitlines()
    assert lines == [str(folder / "sample_3"), str(folder / "sample_4")]
    out = folder.parent / "elsewhere"
    assert run("posterior", "sample", folder, "--out", out, capsys=capsys) == f"{out / 'sample_0'}\n"
    for number, where in ((3, folder / "sample_3"), (4, folder / "sample_4"), (0, out / "sample_0")):
        saved, expected = load_file(where / WEIGHTS), posterior.draw(number)
        assert saved.keys() == expected.keys() and all(saved[name].equal(expected[name]) for name in saved)
    assert "131072" in refused("posterior", "sample", folder, "--first", "131072", capsys=capsys)


@pytest.mark.parametrize("pairs", [False, True])
def test_export(pairs: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = folder.parent / "served", antithetic(3) if pairs else [0, 1, 2]
    said = run("posterior", "export", folder, "-n", 3, "--out", out, *["--pairs"] * pairs, capsys=capsys)
    assert said == f"{out / MANIFEST}\n"
    adapters = json.loads((out / MANIFEST).read_text())["adapters"]
    assert [adapter["sample"] for adapter in adapters] == [None, *numbers]
    expected = [Posterior.load(folder).mean, *(Posterior.load(folder).draw(number) for number in numbers)]
    for adapter, weights in zip(adapters, expected, strict=True):
        saved = load_file(out / adapter["path"] / WEIGHTS)
        assert saved.keys() == weights.keys() and all(saved[name].equal(weights[name]) for name in saved)
    run("posterior", "export", folder, "-n", 0, "-o", folder.parent / "mean", *["--pairs"] * pairs, capsys=capsys)
    assert [path.name for path in (folder.parent / "mean").iterdir() if path.is_dir()] == ["mean"]


def test_temper(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "cold"
    assert run("posterior", "temper", folder, "4", "--out", out, capsys=capsys) == f"{out}\n"
    assert_equal(Posterior.load(out), Posterior.load(folder).tempered(4.0))
    model = PeftModel.from_pretrained(llama(), out)  # with its configuration
    assert Posterior.load(out).parameters_of(model)
    assert "above 0" in refused("posterior", "temper", folder, "0", "--out", folder.parent / "none", capsys=capsys)
    assert not (folder.parent / "none").exists()


def test_merge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, out = folder.parent / "other", folder.parent / "merged"
    model = lora_llama()
    _, posterior = trained(model, lr=0.3, seed=8)
    model.save_pretrained(other)
    posterior.save(other)
    run("posterior", "merge", folder, other, "--out", out, "-w", "1", "-w", "0.5", capsys=capsys)
    expected = merge([Posterior.load(folder), Posterior.load(other)], [1.0, 0.5])
    assert_equal(Posterior.load(out), expected)
    saved = load_file(out / WEIGHTS)
    assert all(saved[name].equal(mean) for name, mean in expected.mean.items())
    assert "got 2 and 1" in refused("posterior", "merge", folder, other, "-o", "x", "-w", "1", capsys=capsys)
    again = refused("posterior", "merge", folder, other, "--out", out, capsys=capsys)
    assert f"{out} holds a posterior already" in again


def test_a_mean_has_the_dtype_of_the_weights_that_it_replaces(tmp_path: Path) -> None:
    model = lora_llama().to(torch.bfloat16)
    _, posterior = trained(model)
    model.save_pretrained(tmp_path / "a")
    posterior.save(tmp_path / "a")
    posterior.pruned(0.5).save_with_mean(tmp_path / "b")
    saved, expected = load_file(tmp_path / "b" / WEIGHTS), posterior.pruned(0.5).mean
    assert all(
        value.dtype == torch.bfloat16 and value.equal(expected[name].bfloat16()) for name, value in saved.items()
    )
    assert_equal(Posterior.load(tmp_path / "b"), posterior.pruned(0.5))


def test_a_mean_needs_weights_of_its_model(folder: Path) -> None:
    posterior, out = Posterior.load(folder), folder.parent / "out"
    with pytest.raises(ValueError, match="say whose weights its mean shall replace"):
        Posterior(dict(posterior), posterior.seed).save_with_mean(out)
    wider = {name: value.repeat(2, 1) for name, value in load_file(folder / WEIGHTS).items()}
    (folder.parent / "wide").mkdir()
    save_file(wider, folder.parent / "wide" / WEIGHTS)
    with pytest.raises(ValueError, match=r"has the shape .* they belong to different models"):
        posterior.save_with_mean(out, source=folder.parent / "wide")
    assert not (out / POSTERIOR).exists()


@pytest.mark.parametrize("command", ["info", "sample"])
def test_a_folder_without_a_posterior_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"there is no {POSTERIOR} in {tmp_path}" in refused("posterior", command, tmp_path, capsys=capsys)


def test_damaged_weights_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / WEIGHTS).write_bytes(b"nothing")
    assert "is not a whole safetensors file" in refused("posterior", "info", folder, capsys=capsys)


# ---- convert ---------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, model: nn.Module | None = None) -> Posterior:
    """An adapter on a saved base model, and the optimizer's state beside it."""
    model = lora_llama() if model is None else model
    optimizer, posterior = trained(model)
    llama().save_pretrained(folder.parent / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder.parent / "base")
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return posterior


@pytest.mark.parametrize("by", ["folder", "file", "file and folder"])
def test_convert(by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    posterior = checkpoint(folder)
    if by == "file and folder":
        (folder / "optimizer.pt").rename(tmp_path / "state.pt")
    given = {"folder": [folder], "file": [folder / "optimizer.pt"], "file and folder": [tmp_path / "state.pt", folder]}
    said = run("convert", *given[by], capsys=capsys)
    assert said.startswith(f"{folder / POSTERIOR}: Posterior(adapter default, tensors 4")
    assert_equal(Posterior.load(folder), posterior)
    assert f"{folder} holds a posterior already" in refused("convert", *given[by], capsys=capsys)


def test_convert_on_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    posterior = checkpoint(folder)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert str(tmp_path / "base") in refused("convert", folder, capsys=capsys)
    run("convert", folder, "--base", tmp_path / "moved", capsys=capsys)
    assert_equal(Posterior.load(folder), posterior)


def test_convert_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    optimizer, posterior = trained(model)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    run("convert", tmp_path, capsys=capsys)
    assert_equal(Posterior.load(tmp_path), posterior)


@pytest.mark.slow
def test_convert_a_trainers_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = lora_llama()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer = make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=4)
    trainer.train()
    capsys.readouterr()
    folder = tmp_path / "checkpoint-4"
    saved = Posterior.load(folder)
    (folder / POSTERIOR).unlink()
    run("convert", folder, capsys=capsys)
    assert_equal(Posterior.load(folder), saved)


def test_convert_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"there is no {tmp_path / 'optimizer.pt'}" in refused("convert", tmp_path, capsys=capsys)
    folder = tmp_path / "adapter"
    checkpoint(folder)
    state = (folder / "optimizer.pt").read_bytes()
    for content in (b"", b"nothing at all", state[: len(state) // 2]):
        (folder / "optimizer.pt").write_bytes(content)
        assert "is not a state dict that torch.load reads" in refused("convert", folder, capsys=capsys)
    (folder / "optimizer.pt").write_bytes(state)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "GUESSING"}))
    assert "'GUESSING'" in refused("convert", folder, capsys=capsys)
    (folder / "adapter_config.json").unlink()
    assert "neither an adapter_config.json nor a config.json" in refused("convert", folder, capsys=capsys)
    assert not (folder / POSTERIOR).exists()
