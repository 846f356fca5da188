"""What is called a little wrong ends in one sentence, and numbers are taken from wherever they come."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ivon_kernels import IVON
from ivon_kernels.posterior import Prediction, next_token, report

ONE = [100, 100.0, np.int64(100), np.float32(100), torch.tensor(100), torch.tensor([100.0]), np.array(100)]


@pytest.mark.parametrize("number", ONE, ids=lambda n: f"{type(n).__name__}-{getattr(n, 'dtype', '')}")
def test_numbers_of_for_lora_come_from_anywhere(number: Any) -> None:
    def group(given: Any, sigma: Any) -> dict[str, Any]:
        return IVON.for_lora([nn.Parameter(torch.zeros(2))], given, steps=given, sigma=sigma, seed=1).param_groups[0]

    found, expected = group(number, torch.tensor(0.0625)), group(100, 0.0625)
    assert {**found, "params": None} == {**expected, "params": None}
    assert type(found["ess"]) is float and type(found["lr"]) is float
    published = IVON.for_lora([nn.Parameter(torch.zeros(2))], number, recipe="paper")
    assert published.param_groups[0]["ess"] == 1e6


@pytest.mark.parametrize("bad", [[100], "100", None, 0, np.nan, torch.tensor([1, 2]), np.arange(2), object(), {}])
def test_what_is_no_number_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_data must be at least 1, got "):
        IVON.for_lora([nn.Parameter(torch.zeros(2))], bad)
    if bad is not None:
        with pytest.raises(ValueError, match=r"^steps must be at least 1, got "):
            IVON.for_lora([nn.Parameter(torch.zeros(2))], 100, steps=bad)
        with pytest.raises(ValueError, match=r"^sigma must be positive, got "):
            IVON.for_lora([nn.Parameter(torch.zeros(2))], 100, sigma=bad)


@pytest.mark.parametrize("words", [[" yes"], [" yes", " no"], " yes", [1, 2.5], ("a",), [None, 1]], ids=repr)
def test_answers_that_are_no_tokens(words: Any) -> None:
    with pytest.raises(ValueError, match=r"^choices must be token ids, got .*input_ids.*encode_choices"):
        next_token(words)


@pytest.mark.parametrize("words", [3, 2.5, torch.tensor(3)], ids=repr)
def test_one_answer(words: Any) -> None:
    with pytest.raises(ValueError, match=r"^choices must be"):
        next_token(words)


def test_tokens_come_from_anywhere() -> None:
    next_token([np.int64(3), torch.tensor(4)])
    next_token(torch.tensor([3, 4]))


def prediction() -> Prediction:
    return Prediction.from_samples(torch.full((1, 4, 2), 0.5), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (prediction(), r"report needs predictions by name, \{'10 samples': prediction\}, got Prediction"),
        ([prediction()], "by name, .* got list"),
        ({"mean": torch.ones(4, 2)}, "by name, but 'mean' is Tensor: take what predict"),
    ],
    ids=["one", "list", "tensor"],
)
def test_report_wants_predictions_by_name(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        report(tmp_path / "page", given)
    assert not (tmp_path / "page").exists()


HIDDEN = """
import sys
for name in "matplotlib sklearn torchmetrics huggingface_hub accelerate lightning pytorch_lightning".split():
    sys.modules[name] = None
from importlib import import_module
import torch
from ivon_kernels.posterior import Posterior, Prediction, evaluate, report
from ivon_kernels.predict import metrics
from ivon_kernels.report import plots
p, labels = torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 1])
for call in (
    lambda: evaluate(p, labels),
    lambda: report(sys.argv[1], {"mean": Prediction.from_samples(p[None], labels)}),
    lambda: plots.reliability_diagram(p, labels),
    lambda: plots.confidence_histogram(p),
    lambda: Posterior.load("somebody/something"),
    lambda: import_module("ivon_kernels.integrations.transformers"),
    lambda: import_module("ivon_kernels.integrations.trl"),
    lambda: import_module("ivon_kernels.integrations.lightning"),
):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_missing_extra_ends_in_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(tmp_path / "page")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stdout + done.stderr
    assert all("ivon-kernels[report]" in line and "is not installed: pip install" in line for line in lines[:4])
    hub, transformers, trl, lightning = lines[4:]
    end = "which is not installed: pip install 'ivon-kernels"
    assert hub == f"Posterior.load() of a repository needs huggingface_hub, {end}[hf]'"
    assert transformers == f"ivon_kernels.integrations.transformers needs accelerate, {end}[hf]'"
    assert trl.startswith("ivon_kernels.integrations.trl needs ") and trl.endswith(f"{end}[hf]'")
    assert lightning == f"ivon_kernels.integrations.lightning needs lightning, {end}[lightning]'"
    assert not (tmp_path / "page").exists()
