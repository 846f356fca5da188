"""The page about predictions: its table, its pictures, and what it leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
import torch

from ivon_kernels.posterior import Gaussian
from ivon_kernels.predict.metrics import evaluate, vote_entropy
from ivon_kernels.predict.prediction import Prediction
from ivon_kernels.report.page import report

LABELS = torch.tensor([0, 1, 2, 1, 0, 2])
VOTES = torch.tensor([[3, 1, 0], [0, 4, 0], [1, 1, 2], [0, 3, 1], [4, 0, 0], [0, 0, 4]])


def prediction(samples: int, labels: torch.Tensor | None = None) -> Prediction:
    logits = torch.randn(samples, 6, 3, generator=torch.Generator().manual_seed(samples))
    return Prediction.from_samples(logits.double().softmax(-1), labels)


def linked(page: Path) -> list[str]:
    """The pictures that the page shows, each of which must be there."""
    names = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
    for name in names:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    return names


def test_a_page_with_everything(tmp_path: Path) -> None:
    style = dict(matplotlib.rcParams)
    predictions = {"mean": prediction(1), "3 samples | ours": prediction(3)}
    posterior = {"layers.0.weight": Gaussian(torch.ones(3), torch.ones(3), 0, 1.0, 0.0)}
    page = report(tmp_path / "new" / "folder", predictions, LABELS, posterior, votes=VOTES, title="Six examples")
    assert page == tmp_path / "new" / "folder" / "report.md"
    names = linked(page)
    assert names == [
        "reliability.png",
        "selective_accuracy.png",
        "entropy.png",
        "mutual_information.png",
        "sigma.png",
        "snr.png",
    ]
    assert sorted(path.name for path in page.parent.iterdir()) == sorted([*names, "report.md"])
    lines = page.read_text().splitlines()
    assert lines[0] == "# Six examples"
    assert "6 examples." in lines
    for row, name in (("| mean |", "mean"), (r"| 3 samples \| ours |", "3 samples | ours")):
        (found,) = (line for line in lines if line.startswith(row))
        scores = evaluate(predictions[name].probabilities, LABELS, VOTES)
        assert found.removeprefix(row) == "".join(f" {value:.3f} |" for value in vars(scores).values())
    assert f"their own entropy, {vote_entropy(VOTES):.3f} nats" in page.read_text()
    assert dict(matplotlib.rcParams) == style


def test_labels_of_the_predictions_are_enough(tmp_path: Path) -> None:
    page = report(tmp_path, {"mean": prediction(1, LABELS)})
    assert linked(page) == ["reliability.png", "selective_accuracy.png", "entropy.png"]
    assert "votes" not in page.read_text()


def test_without_labels_nothing_is_judged_and_an_older_page_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("an older page: accuracy")
    page = report(tmp_path, {"3 samples": prediction(3)})
    assert linked(page) == ["confidence.png", "entropy.png", "mutual_information.png"]
    assert "accuracy" not in page.read_text()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one prediction"):
        report(tmp_path, {})
    with pytest.raises(ValueError, match=r"shape \[6\]"):
        report(tmp_path, {"mean": prediction(1)}, LABELS[:4])
    assert not list(tmp_path.iterdir())
