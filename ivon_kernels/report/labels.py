"""A page about training examples whose labels may be wrong: the worst of them in a table, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ivon_kernels.extras import REPORT, needed_for
from ivon_kernels.predict.prediction import IGNORED, Prediction
from ivon_kernels.report import plots
from ivon_kernels.report.page import DPI

__all__ = ["report_labels"]

PAGE = "labels.md"
PICTURE = "labels.png"
_LEGEND = (
    "The probability is the label's when its example is left out of the training; beside it stands the most probable "
    "other class. The picture has every example, the worst marked."
)
_LENGTH = 120  # characters of an example that the table shows


def report_labels(
    folder: str | Path,
    scores: Tensor,
    left_out: Prediction,
    examples: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    votes: Tensor | None = None,
    worst: int = 20,
) -> Path:
    """Write a Markdown page with the training examples whose labels are the most doubtful, and a picture of all.

    Args:
        folder: Where to write; made if it is not there.
        scores: `[N]`, how doubtful each label is: `posterior.sensitivity(...)`, or any other number of each example.
        left_out: `posterior.leave_one_out(...)` of the same examples in the same order.
        examples: What each of them is, `N` texts.
        classes: Names of the classes; None numbers them.
        votes: `[N, C]`, how many people chose each class of each example.
        worst: How many examples the table has.

    Returns:
        The page, `labels.md` in the folder.

    Raises:
        ValueError: The prediction has no labels, or the arguments are not of the same examples and classes.
        ModuleNotFoundError: The extra `report` is not installed; nothing is written then.
    """
    labels, names = left_out.labels, _names(classes, left_out)
    if labels is None:
        raise ValueError("the prediction has no labels: give leave_one_out() batches that hold them")
    scores = scores.detach().cpu().double()
    rows = [scores.shape[0] if scores.dim() == 1 else -1, len(examples), len(left_out if votes is None else votes)]
    if rows != [len(left_out)] * 3:
        raise ValueError(f"scores, examples and votes must be of the {len(left_out)} examples of the prediction")
    with needed_for("report_labels()", REPORT):
        from matplotlib.figure import Figure

    order = torch.where(labels == IGNORED, -torch.inf, scores).argsort(descending=True, stable=True)
    order = order[: min(worst, int((labels != IGNORED).sum()))]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    plots.label_map(scores, left_out.probabilities, labels, figure.subplots(), worst=len(order))
    figure.savefig(folder / PICTURE, dpi=DPI)
    heads = ["", "example", "label", "its probability", "instead", "score"] + (
        [] if votes is None else ["votes for it"]
    )
    lines = ["# Doubtful labels", "", f"The {len(order)} most doubtful of {len(left_out)} examples.", ""]
    lines += [_row(heads), _row(["---:", "---", "---", "---:", "---", *["---:"] * (len(heads) - 5)])]
    for rank, i in enumerate(order.tolist(), 1):
        label, p = int(labels[i]), left_out.probabilities[i]
        other = int(p.index_fill(0, labels[i], -1.0).argmax())
        cells = [str(rank), _shortened(examples[i]), names[label], f"{p[label]:.3f}", names[other], f"{scores[i]:.3g}"]
        if votes is not None:
            cells.append(f"{int(votes[i, label])} of {int(votes[i].sum())}")
        lines.append(_row(cells))
    lines += ["", _LEGEND, "", f"![doubtful labels]({PICTURE})"]
    page = folder / PAGE
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _names(classes: Sequence[str] | None, prediction: Prediction) -> list[str]:
    count = prediction.probabilities.shape[1]
    names = [str(number) for number in range(count)] if classes is None else list(classes)
    if len(names) != count:
        raise ValueError(f"classes must name the {count} classes of the prediction, got {len(names)} names")
    return names


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"
    return text.replace("|", r"\|")
