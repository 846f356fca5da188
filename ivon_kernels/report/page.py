"""A page about predictions: the table of scores and the pictures, as PNG files with a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ivon_kernels.extras import REPORT, needed_for
from ivon_kernels.predict import metrics
from ivon_kernels.predict.prediction import Prediction
from ivon_kernels.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ivon_kernels.gaussians.gaussian import Gaussian

__all__ = ["draw_reliability", "report", "table"]

PAGE = "report.md"
TITLE = "Predictions of the posterior"
DPI = 120
_PANEL = 3.6  # inches
_COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "ece_adaptive": "adaptive ECE",
    "brier": "Brier",
    "auroc_errors": "AUROC of errors",
    "aurc": "AURC",
    "selective_accuracy": "selective accuracy",
    "vote_cross_entropy": "cross-entropy to votes",
    "vote_kl": "KL from votes",
}
_LAYERS: tuple[tuple[str, Callable[..., Axes], str], ...] = (
    (
        "sigma.png",
        plots.sigma_per_layer,
        "Standard deviation of the weights: dots are medians, thick lines hold 50% of them and thin ones 90%.",
    ),
    (
        "snr.png",
        plots.snr_per_layer,
        "Signal-to-noise ratio of the weights: below 1 the noise is larger than the mean.",
    ),
)


def report(
    folder: str | Path,
    predictions: Mapping[str, Prediction],
    labels: Tensor | None = None,
    posterior: Mapping[str, Gaussian] | None = None,
    *,
    votes: Tensor | None = None,
    title: str = TITLE,
) -> Path:
    """Write a Markdown page with the scores of predictions, and the pictures that it shows.

    Args:
        folder: Where to write; made if it is not there. Files of an earlier report in it are replaced.
        predictions: By name, of the same examples; the names head rows and panels. Four are well readable.
        labels: int `[N]`, the right classes; None takes those of the predictions. Without any, what needs them is left
            out.
        posterior: A `Posterior`, for the pictures of sigma and signal-to-noise per layer.
        votes: `[N, C]`, how many people chose each class of each example.
        title: Heading of the page.

    Returns:
        The page, `report.md` in the folder.

    Raises:
        TypeError: Predictions are not given by name.
        ValueError: There are no predictions, or labels or votes do not fit them.
        ModuleNotFoundError: The extra `report` is not installed; nothing is written then.
    """
    if not isinstance(predictions, Mapping):
        got = type(predictions).__name__
        raise TypeError(f"report needs predictions by name, {{'10 samples': prediction}}, got {got}")
    if not predictions:
        raise ValueError("report needs at least one prediction, by name: {'10 samples': prediction}.")
    for name, prediction in predictions.items():
        if not isinstance(prediction, Prediction):
            got = type(prediction).__name__
            raise TypeError(f"report needs predictions by name, but {name!r} is {got}: take what predict() returns")
    with needed_for("report()", REPORT):
        import torchmetrics  # noqa: F401
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if labels is None:
        labels = next((p.labels for p in predictions.values() if p.labels is not None), None)
    probabilities = {name: prediction.probabilities for name, prediction in predictions.items()}
    examples = len(next(iter(probabilities.values())))
    lines = [f"# {title}", "", f"{examples} examples."]
    if labels is not None:
        scores = {name: metrics.evaluate(p, labels, votes) for name, p in probabilities.items()}
        floor = None if votes is None else metrics.vote_entropy(votes)
        lines += ["", *table(scores), "", _legend(floor)]
    for name, caption in _draw(folder, predictions, labels, posterior):
        lines += ["", f"![{Path(name).stem.replace('_', ' ')}]({name})", "", caption]
    page = folder / PAGE
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def table(scores: Mapping[str, metrics.Scores]) -> list[str]:
    """The lines of a Markdown table with one row of scores for each name; columns without a score are left out."""
    columns = [field for field in _COLUMNS if all(getattr(s, field) is not None for s in scores.values())]
    lines = [_row(["", *(_COLUMNS[field] for field in columns)]), _row(["---", *("---:" for _ in columns)])]
    for name, found in scores.items():
        lines.append(_row([name.replace("|", r"\|"), *(f"{getattr(found, field):.3f}" for field in columns)]))
    return lines


def draw_reliability(
    path: Path, predictions: Mapping[str, Tensor], labels: Tensor, *, title: str | None = None
) -> None:
    """Write a PNG with a reliability diagram for each prediction, over how often each confidence occurs.

    Args:
        path: The file.
        predictions: Probabilities `[N, C]` by name.
        labels: int `[N]`.
        title: Over all panels.
    """
    figure, axes = _figure(2, len(predictions), height_ratios=(3, 1), sharex=True, sharey="row")
    for number, (name, probabilities) in enumerate(predictions.items()):
        color = plots.SERIES[number % len(plots.SERIES)]
        plots.reliability_diagram(probabilities, labels, axes[0][number], color=color).set(title=name, xlabel="")
        plots.confidence_histogram(probabilities, None, axes[1][number], color=color)
    _save(figure, axes, path, title)


def _draw(
    folder: Path, predictions: Mapping[str, Prediction], labels: Tensor | None, posterior: Any
) -> Iterable[tuple[str, str]]:
    """Draws every picture that there is data for; yields file names and captions."""
    probabilities = {name: prediction.probabilities for name, prediction in predictions.items()}
    information = {
        name: prediction.mutual_information
        for name, prediction in predictions.items()
        if prediction.mutual_information.max() > 0  # not at the mean
    }
    if labels is not None:
        draw_reliability(folder / "reliability.png", probabilities, labels)
        yield (
            "reliability.png",
            "Accuracy against confidence; the numbers are examples, and markers below the diagonal are overconfident.",
        )
        figure, axes = _figure(1, 1, panel=5.0)
        plots.risk_coverage(probabilities, labels, axes[0][0])
        _save(figure, axes, folder / "selective_accuracy.png")
        yield "selective_accuracy.png", "Accuracy when only the most confident part is answered: higher is better."
    else:
        _panels(
            folder / "confidence.png",
            probabilities,
            lambda name, ax: plots.confidence_histogram(probabilities[name], ax=ax),
        )
        yield "confidence.png", "How often each confidence occurs."

    _panels(
        folder / "entropy.png",
        probabilities,
        lambda name, ax: plots.entropy_histogram(probabilities[name], labels, ax),
    )
    yield "entropy.png", "Entropy of the predictions: the wrong answers should be the uncertain ones."
    if information:
        _panels(
            folder / "mutual_information.png",
            information,
            lambda name, ax: plots.entropy_histogram(
                probabilities[name], labels, ax, mutual_information=information[name]
            ),
        )
        yield "mutual_information.png", "Mutual information of answer and weights: what the samples disagree about."
    if posterior is not None:
        for name, draw, caption in _LAYERS:
            figure, axes = _figure(1, 1, panel=7.0, height=3.8)
            draw(posterior, axes[0][0])
            _save(figure, axes, folder / name)
            yield name, caption


def _panels(path: Path, names: Iterable[str], draw: Callable[[str, Axes], Axes]) -> None:
    """Writes a PNG with one panel for each name."""
    names = list(names)
    figure, axes = _figure(1, len(names), sharey=True)
    for name, ax in zip(names, axes[0], strict=True):
        draw(name, ax).set_title(name)
    _save(figure, axes, path)


def _figure(rows: int, columns: int, *, panel: float = _PANEL, height: float = 0.0, **options: Any) -> tuple[Any, Any]:
    # Not through pyplot, which would keep the figure and may want a display.
    with needed_for("a picture", REPORT):
        from matplotlib.figure import Figure

    size = (panel * columns + 0.4, height or (4.9 if rows == 2 else panel))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Any, axes: Any, path: Path, title: str | None = None) -> None:
    for row in axes:
        for ax in row[1:]:
            if ax.get_shared_y_axes().joined(row[0], ax):
                ax.set_ylabel("")
    if title is not None:
        figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _legend(floor: float | None) -> str:
    text = (
        "NLL in nats; ECE over 10 equal bins of the confidence, adaptive ECE over 10 bins of equally many examples; "
        "Brier summed over the classes (0 to 2); AUROC of errors: does confidence tell right from wrong (0.5: not at "
        "all); AURC: area under the risk-coverage curve; selective accuracy: on the most confident 80%."
    )
    if floor is None:
        return text
    return f"{text} No prediction has a cross-entropy to the votes below their own entropy, {floor:.3f} nats."
