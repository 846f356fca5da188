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
from ivon_kernels.report.labels import report_labels
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


def test_the_most_doubtful_labels_come_first(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 2, 1, -100, 2])
    left_out = prediction(3, labels)
    scores = torch.tensor([0.1, 4.0, 0.5, 2.0, 9.0, 0.0])
    names = ["zero", "one", "two"]
    examples = ["a", "b | c", "c", "d " * 100, "e", "f"]
    page = report_labels(tmp_path / "new", scores, left_out, examples, classes=names, votes=VOTES, worst=3)
    assert page == tmp_path / "new" / "labels.md" and linked(page) == ["labels.png"]
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| 1", "| 2", "| 3"]
    assert [row[-2] for row in rows] == ["4", "2", "0.5"]  # the largest score belongs to an example without a label
    assert rows[0][1] == r"b \| c" and rows[1][1].endswith("…") and len(rows[1][1]) == 120
    assert [row[-1] for row in rows] == ["4 of 4 |", "3 of 4 |", "2 of 4 |"]
    p = left_out.probabilities[1]
    other = 0 if p[0] > p[2] else 2
    assert rows[0][2:5] == ["one", f"{p[1]:.3f}", names[other]]
    bare = report_labels(tmp_path, scores, left_out, examples)
    assert "votes" not in bare.read_text() and len(re.findall(r"^\| \d", bare.read_text(), re.MULTILINE)) == 5


def test_doubtful_labels_of_other_examples_are_refused(tmp_path: Path) -> None:
    scores, examples, few = torch.rand(6), list("abcdef"), VOTES[1:]
    for call, message in (
        (lambda: report_labels(tmp_path, scores, prediction(3), examples), "has no labels"),
        (lambda: report_labels(tmp_path, scores[1:], prediction(3, LABELS), examples), "of the 6 examples"),
        (lambda: report_labels(tmp_path, scores, prediction(3, LABELS), examples[1:]), "of the 6 examples"),
        (
            lambda: report_labels(tmp_path, scores, prediction(3, LABELS), examples, votes=few),
            "of the 6 examples",
        ),
        (lambda: report_labels(tmp_path, scores, prediction(3, LABELS), examples, classes=["a"]), "name the 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())
