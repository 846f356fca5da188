"""``ivon-kernels demo``: its data, its table, its sentence, and how it ends where something is missing."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from ivon_kernels import demo
from ivon_kernels.commands.app import main
from ivon_kernels.posterior import Prediction

QUICK = ["demo", "--seeds", "1", "--steps", "20", "--picture"]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short run prints, and where its picture is."""
    picture = tmp_path_factory.mktemp("demo") / "here.png"
    with pytest.MonkeyPatch.context() as patch:
        written = io.StringIO()
        patch.setattr("sys.stdout", written)
        main([*QUICK, str(picture)])
    return written.getvalue(), picture


@pytest.mark.slow
def test_a_short_run_prints_a_table_and_a_sentence_and_draws_a_picture(said: tuple[str, Path]) -> None:
    text, picture = said
    lines = text.splitlines()
    assert lines[0].startswith(
        "400 handwritten digits to learn from, 15% of them with a wrong label; 20 steps, 1 run, "
    )
    (head,) = (number for number, line in enumerate(lines) if line.split() == ["accuracy", "NLL", "ECE"])
    rows = lines[head + 1 : head + 6]
    assert [row[:26].strip() for row in rows] == [
        "AdamW",
        "AdamW, scaled",
        "IVON, mean",
        "IVON, 10 samples",
        "IVON, 10 samples, scaled",
    ]
    assert all(len(row[26:].split()) == 3 and 0 <= float(row[26:].split()[0]) <= 1 for row in rows)
    assert lines[head + 7].startswith("In one pass IVON's mean has an NLL of ") and lines[head + 7].endswith(".")
    assert lines[-1] == f"Confidence against accuracy, all runs together: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, lines[: head + 6])) <= 120


def test_fifteen_percent_of_the_training_labels_are_wrong_and_no_others() -> None:
    labels = torch.arange(1797) % 10
    images = torch.arange(1797.0)[:, None].expand(-1, 64)  # each digit's image says which it is
    for seed in range(3):
        digits = demo._split(demo.Part(images, labels), seed)
        true = [labels[part.images[:, 0].long()] for part in digits]
        assert [len(part.labels) for part in digits] == [400, 400, 997]
        assert (digits.training.labels != true[0]).sum() == 60 and digits.training.labels.min() >= 0
        assert digits.training.labels.max() <= 9
        assert torch.equal(digits.validation.labels, true[1]) and torch.equal(digits.test.labels, true[2])
        assert len(torch.cat([part.images[:, 0] for part in digits]).unique()) == 1797
    assert torch.equal(labels, torch.arange(1797) % 10)  # the wrong ones are a copy's


def found(sure: float, right: float, labels: int = 100) -> Prediction:
    """Two classes, so much confidence, so many right answers."""
    wrong = round(labels * (1 - right))
    probabilities = torch.tensor([[sure, 1 - sure]]).expand(labels, 2)
    return Prediction.from_samples(probabilities[None], (torch.arange(labels) < wrong).long())


def result(*runs: tuple[float, float, float]) -> demo.Result:
    """A result with the confidences of AdamW, IVON's mean and its samples in each run; all are right on 90%."""
    rows = {
        row: [found(run[which], 0.9) for run in runs]
        for row, which in ((demo.ADAMW, 0), (demo.ADAMW_SCALED, 0), (demo.MEAN, 1), (demo.DRAWN, 2))
    }
    return demo.Result({**rows, demo.DRAWN_SCALED: rows[demo.DRAWN]}, [3e-3] * len(runs))


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (
            [(0.6, 0.9, 0.9)] * 2,
            ["(lower in every run) and is right", "(lower in every run);", "are well calibrated: "],
        ),
        (
            [(0.9, 0.7, 0.7)] * 2,
            ["(lower in no run) and", "(lower in no run);", "underconfident: right on 90.0% with a "],
        ),
        ([(0.6, 0.9, 0.99), (0.9, 0.6, 0.99)], ["(lower in 1 of 2 runs, which decides nothing)", "overconfident"]),
        ([(0.6, 0.9, 0.7)], ["0.325 against AdamW's 0.551 (lower, in one run)", "with a confidence of 70.0%."]),
        ([(0.9, 0.6, 0.7)], ["0.551 against AdamW's 0.325 (not lower, in one run)"]),
    ],
    ids=["wins", "loses", "neither", "one win", "one loss"],
)
def test_the_sentence_follows_the_numbers(runs: list[tuple[float, float, float]], words: list[str]) -> None:
    sentence = result(*runs).conclusion()
    assert all(word in sentence for word in words), sentence
    assert sentence.count(". ") == 0 and sentence.endswith(".")


def test_a_table_of_several_runs_has_the_smallest_and_the_largest() -> None:
    lines = result((0.6, 0.9, 0.9), (0.9, 0.9, 0.9)).table()
    assert "0.438 (0.325 to 0.551)" in lines[1]


@pytest.mark.slow
def test_without_matplotlib_there_is_a_table_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "run", lambda seeds, steps: result((0.6, 0.9, 0.9)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([*QUICK, str(tmp_path / "no.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("No picture: a picture needs matplotlib")
    assert lines[-1].endswith("pip install 'ivon-kernels[report]'")
    assert any(line.startswith("IVON, mean") for line in lines) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_missing_or_cannot_be_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["demo", *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1
        return error

    assert refused("--seeds", "0") == (
        "Error: ivon-kernels demo: Invalid value for '--seeds': Input should be greater than or equal to 1\n"
    )
    assert "Invalid value for '--steps'" in refused("--steps", "x")
    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", lambda seeds, steps: result((0.6, 0.9, 0.9)))
        assert "No such file or directory" in refused("--picture", str(tmp_path / "nowhere" / "no.png"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "the demo needs sklearn" in refused()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--help"])
    help_text = capsys.readouterr().out
    assert "handwritten digits" in help_text and "--picture" in help_text
