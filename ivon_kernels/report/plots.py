"""Pictures of predictions and posteriors; each function draws on given axes, or on new ones, and returns them.

Nothing global is touched: no backend is chosen and no style is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ivon_kernels.extras import REPORT, needed_for
from ivon_kernels.predict import metrics
from ivon_kernels.predict.abstaining import Threshold
from ivon_kernels.predict.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ivon_kernels.gaussians.gaussian import Gaussian

# Apart in brightness too, so that they stay apart in grey and for colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b64ad", "#e08a3c", "#1b9e77", "#8c5fa8", "#6b7280"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_TICKS = 16
_FEW = 5  # examples in a bin, below which it says little
_LEAST_SCORE = 1e-12  # a logarithm needs one
_FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)
_KINDS = {"lora_A": BLUE, "lora_B": ORANGE, "weights": GREEN}


def new_axes(ax: Axes | None) -> Axes:
    """`ax`, or axes of a new figure of pyplot's."""
    if ax is not None:
        return ax
    with needed_for("a picture", REPORT):
        from matplotlib import pyplot

    _, made = pyplot.subplots(layout="constrained")
    return made


def _legend(ax: Axes, loc: Literal["upper left", "upper right"]) -> None:
    """A legend above the bars, which get the lower part of the axes."""
    ax.margins(y=0.3)  # not set_ylim, which axes that share y would each do once more
    ax.legend(fontsize=8, frameon=False, loc=loc)


def reliability_diagram(
    probabilities: Tensor, labels: Tensor, ax: Axes | None = None, *, bins: int = metrics.BINS, color: str = BLUE
) -> Axes:
    """Accuracy against confidence in equal bins of the confidence, with the number of examples in each bin.

    A bar is as high as the accuracy of its bin; the marker on it is at the bin's mean confidence, and the line from it
    to the diagonal is the bin's calibration error: a marker below the diagonal is overconfidence. Bins of fewer than
    five examples are faded.

    Args:
        probabilities: `[N, C]`.
        labels: int `[N]`.
        ax: where to draw; None makes a new figure.
        bins: number of bins.
        color: of bars and markers.
    """
    ax = new_axes(ax)
    from matplotlib.colors import to_rgba_array

    points = metrics.reliability(probabilities, labels, bins)
    filled = [number for number, count in enumerate(points.counts) if count]
    left = [number / bins for number in filled]
    ax.plot([0, 1], [0, 1], color="0.45", linewidth=1, linestyle="--", label="calibrated", zorder=1)
    sure = [1.0 if points.counts[number] >= _FEW else 0.3 for number in filled]
    bars = [0.28 * share for share in sure]
    ax.bar(left, points.accuracy, 1 / bins, align="edge", color=to_rgba_array(color, bars), edgecolor="white", zorder=0)
    lines: Any = to_rgba_array(color, [0.75 * share for share in sure])
    ax.vlines(points.confidence, points.accuracy, points.confidence, colors=lines, linewidth=2.5, zorder=2)
    dots = to_rgba_array(color, sure)
    ax.scatter(points.confidence, points.accuracy, 25, dots, clip_on=False, zorder=3)
    for start, accuracy, count in zip(left, points.accuracy, [points.counts[number] for number in filled], strict=True):
        inside = accuracy > 0.07
        ax.text(
            start + 0.5 / bins, 0.015 if inside else accuracy + 0.03, str(count), ha="center", va="bottom", fontsize=7.5
        )
    scores = metrics.evaluate(probabilities, labels)
    summary = f"accuracy {scores.accuracy:.3f}\nECE {scores.ece:.3f}\nn = {len(labels)}"
    ax.text(0.03, 0.97, summary, transform=ax.transAxes, va="top", fontsize=9)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=_FIFTHS, xlabel="confidence", ylabel="accuracy")
    ax.grid(alpha=0.2)
    return ax


def confidence_histogram(
    probabilities: Tensor,
    labels: Tensor | None = None,
    ax: Axes | None = None,
    *,
    bins: int = metrics.BINS,
    color: str = BLUE,
) -> Axes:
    """How many examples were answered with which confidence; with labels, mean confidence and accuracy as lines.

    Args:
        probabilities: `[N, C]`.
        labels: int `[N]`, or None.
        ax: where to draw; None makes a new figure.
        bins: number of equal bins from 0 to 1.
        color: of the bars.
    """
    ax = new_axes(ax)
    confidence, predicted = probabilities.detach().cpu().double().max(1)
    ax.hist(confidence.clamp(max=1.0).tolist(), bins=bins, range=(0, 1), color=color, edgecolor="white", alpha=0.85)
    ax.set(xlim=(0, 1), xticks=_FIFTHS, xlabel="confidence", ylabel="examples")
    if labels is not None:
        accuracy = (predicted == labels.cpu()).double().mean().item()
        mean = confidence.mean().item()
        ax.axvline(mean, color="0.15", linewidth=1.5, label=f"mean confidence {mean:.2f}")
        ax.axvline(accuracy, color="0.15", linewidth=1.5, linestyle=":", label=f"accuracy {accuracy:.2f}")
        _legend(ax, loc="upper left")
    ax.grid(axis="y", alpha=0.2)
    return ax


def entropy_histogram(
    probabilities: Tensor,
    labels: Tensor | None = None,
    ax: Axes | None = None,
    *,
    mutual_information: Tensor | None = None,
    bins: int = 20,
) -> Axes:
    """The entropy of the predictions, of right and of wrong answers apart: what is uncertain should be what is wrong.

    Args:
        probabilities: `[N, C]`.
        labels: int `[N]`; None draws all answers together.
        ax: where to draw; None makes a new figure.
        mutual_information: `[N]`, in nats: drawn instead of the entropy.
        bins: number of equal bins, from 0 to the largest possible entropy (mutual information: to its largest value).
    """
    ax = new_axes(ax)
    probabilities = probabilities.detach().cpu().double()
    if mutual_information is None:
        values, name = torch.special.entr(probabilities).sum(1), "entropy"
        end = math.log(probabilities.shape[1])
    else:
        values, name = mutual_information.detach().cpu().double(), "mutual information"
        end = max(values.max().item(), 1e-6)
    groups = {"all": (torch.ones(len(values), dtype=torch.bool, device="cpu"), BLUE, "")}
    if labels is not None:
        right = probabilities.argmax(1) == labels.cpu()
        groups = {"right": (right, BLUE, ""), "wrong": (~right, ORANGE, "//")}
    for group, (chosen, color, hatch) in groups.items():
        part = values[chosen]
        about = f"{group}: {len(part)}" + (f", median {part.median().item():.2g} nats" if len(part) else "")
        ax.hist(
            part.clamp(max=end).tolist(),
            bins=bins,
            range=(0, end),
            histtype="stepfilled",
            color=(color, 0.35),
            edgecolor=color,
            linewidth=1.4,
            hatch=hatch,
            label=about,
        )
    ax.set(xlim=(0, end), xlabel=f"{name} (nats)", ylabel="examples")
    _legend(ax, loc="upper right")
    ax.grid(axis="y", alpha=0.2)
    return ax


def risk_coverage(predictions: Tensor | Mapping[str, Tensor], labels: Tensor, ax: Axes | None = None) -> Axes:
    """Selective accuracy: the accuracy on the most confident answers against the share of examples that these are.

    Args:
        predictions: probabilities `[N, C]`, or several by name.
        labels: int `[N]`.
        ax: where to draw; None makes a new figure.
    """
    ax = new_axes(ax)
    named = predictions if isinstance(predictions, Mapping) else {"": predictions}
    lowest = 1.0
    for number, (name, probabilities) in enumerate(named.items()):
        coverage, risk = metrics.risk_coverage(probabilities, labels)
        lowest = min(lowest, (1 - risk[coverage >= 0.1]).min().item())  # the first few answers are all or nothing
        label = f"{name} (AURC {risk.mean().item():.3f})".strip()
        color, line = SERIES[number % len(SERIES)], LINES[number % len(LINES)]
        ax.plot(coverage.tolist(), (1 - risk).tolist(), color=color, linestyle=line, linewidth=1.8, label=label)
    ax.set(xlim=(0, 1), ylim=(max(0.0, lowest - 0.05), 1.01))
    ax.set(xlabel="coverage (share answered, surest first)", ylabel="accuracy on these")
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    ax.grid(alpha=0.2)
    return ax


def label_map(
    scores: Tensor, probabilities: Tensor, labels: Tensor, ax: Axes | None = None, *, worst: int = 20
) -> Axes:
    """How doubtful each training example's label is, against the probability that it has when left out.

    Args:
        scores: `[N]`, not negative, such as the sensitivities; drawn by their logarithms.
        probabilities: `[N, C]`, of the left-out examples.
        labels: int `[N]`; examples with the label -100, which stands for none, are left out.
        ax: where to draw; None makes a new figure.
        worst: how many of the largest scores are marked.
    """
    ax = new_axes(ax)
    known = labels >= 0
    scores, own = scores[known].double(), probabilities[known].gather(1, labels[known, None])[:, 0]
    marked = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    marked[scores.argsort(descending=True, stable=True)[:worst]] = True
    for chosen, color, marker, name in ((~marked, BLUE, "o", "others"), (marked, ORANGE, "D", f"worst {worst}")):
        x, y = own[chosen].tolist(), scores[chosen].clamp(min=_LEAST_SCORE).tolist()
        ax.scatter(x, y, 14, color=color, marker=marker, alpha=0.6, linewidths=0, label=name)
    ax.set_yscale("log")
    ax.set(xlim=(-0.02, 1.02), xticks=_FIFTHS, xlabel="probability of its label, left out", ylabel="score")
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    ax.grid(alpha=0.2)
    return ax


def abstaining(
    prediction: Prediction, labels: Tensor, thresholds: Mapping[str, Threshold], ax: Axes | None = None
) -> Axes:
    """The share of wrong answers against the share of examples that are answered, and where each threshold stops.

    Args:
        prediction: of examples that the thresholds were not found on.
        labels: int `[N]`.
        thresholds: by name, from `Prediction.threshold`; a curve each, by what it judges answers by.
        ax: where to draw; None makes a new figure.

    Raises:
        ValueError: no threshold, or the labels do not fit.
    """
    if not thresholds:
        raise ValueError("abstaining() draws thresholds, by name: {'confidence': prediction.threshold(risk=0.05)}.")
    ax = new_axes(ax)
    wrong = prediction.predicted != metrics.checked_labels(labels, *prediction.probabilities.shape)
    top = 0.0
    for number, (name, threshold) in enumerate(thresholds.items()):
        coverage, risk = metrics.selective_risk(prediction.certainty(threshold.by), wrong)
        color, line = SERIES[number % len(SERIES)], LINES[number % len(LINES)]
        ax.plot(coverage.tolist(), risk.tolist(), color=color, linestyle=line, linewidth=1.8, label=name)
        ax.axhline(threshold.risk, color="0.45", linewidth=1, linestyle=":", zorder=0)
        answered = prediction.answered(threshold)
        if answered.any():
            share, errors = answered.double().mean().item(), wrong[answered].double().mean().item()
            ax.plot([share], [errors], "o", color=color, markersize=7, clip_on=False, zorder=3)
            ax.annotate(
                f"{share:.0%} answered, {errors:.1%} wrong",
                (share, errors),
                (6, -12),
                fontsize=8,
                textcoords="offset points",
                ha="right" if share > 0.6 else "left",
            )
        top = max(top, risk[coverage >= 0.1].max().item(), threshold.risk)  # the first few are all or nothing
    ax.set(xlim=(0, 1), ylim=(0, 1.15 * top), xlabel="coverage (share answered, surest first)", ylabel="wrong of these")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    ax.grid(alpha=0.2)
    return ax


def sigma_per_layer(posterior: Mapping[str, Gaussian], ax: Axes | None = None) -> Axes:
    """The standard deviation of the weights in each layer of the model, LoRA's A and B apart.

    Dots are medians, thick lines hold half of the weights, thin lines 90% of them. The layer is the first number in a
    tensor's name; tensors without one come last, together. Weights without noise (pruned ones) are left out.

    Args:
        posterior: a `Posterior`.
        ax: where to draw; None makes a new figure.

    Raises:
        ValueError: no weight has noise.
    """
    ax = _draw_layers(posterior, lambda gaussian, noisy: gaussian.sigma[noisy], new_axes(ax))
    ax.set_ylabel("sigma, the weights' standard deviation")
    return ax


def snr_per_layer(posterior: Mapping[str, Gaussian], ax: Axes | None = None) -> Axes:
    """The signal-to-noise ratio |mean| / sigma of the weights in each layer, drawn as `sigma_per_layer` does it.

    Where it is far below 1 the noise drowns the mean; pruning drops the smallest.

    Args:
        posterior: a `Posterior`.
        ax: where to draw; None makes a new figure.

    Raises:
        ValueError: no weight has noise.
    """
    ax = _draw_layers(posterior, lambda gaussian, noisy: gaussian.snr[noisy].abs(), new_axes(ax))
    ax.axhline(1, color="0.45", linewidth=1, linestyle="--", zorder=0)
    ax.set_ylabel("signal to noise, |mean| / sigma")
    return ax


def _draw_layers(posterior: Mapping[str, Gaussian], values_of: Callable[[Gaussian, Tensor], Tensor], ax: Axes) -> Axes:
    quantiles, pruned = _quantiles(posterior, values_of)
    layers = sorted({layer for _, layer in quantiles}, key=lambda layer: (layer is None, layer or 0))
    kinds = [kind for kind in _KINDS if any(kind == found for found, _ in quantiles)]
    for number, kind in enumerate(kinds):
        shift = (number - (len(kinds) - 1) / 2) * 0.3
        places = [place for place, layer in enumerate(layers) if (kind, layer) in quantiles]
        rows = [quantiles[kind, layers[place]] for place in places]
        lowest, low, median, high, highest = (list(column) for column in zip(*rows, strict=True))
        x, color = [place + shift for place in places], _KINDS[kind]
        ax.vlines(x, lowest, highest, color=color, linewidth=1.0, alpha=0.8)
        ax.vlines(x, low, high, color=color, linewidth=3.5, alpha=0.55)
        ax.plot(x, median, "o", color=color, markersize=4, label=kind)
    drawn = [value for row in quantiles.values() for value in row]
    positive = [value for value in drawn if value > 0]
    ax.margins(y=0.14)  # room for the legend
    if len(positive) == len(drawn):
        ax.set_yscale("log")
    else:  # zeros have no logarithm
        ax.set_yscale("symlog", linthresh=min(positive, default=1.0))
        ax.set_ylim(bottom=0)
    shown = range(0, len(layers), -(-len(layers) // MAX_TICKS))
    ax.set_xticks(list(shown), ["other" if layers[i] is None else str(layers[i]) for i in shown])
    ax.set(xlabel="layer", xlim=(-0.7, len(layers) - 0.3))
    title = f"{pruned:.0%} pruned, not shown" if pruned else None
    ax.legend(fontsize=8, frameon=False, title=title, title_fontsize=8, loc="upper right", ncols=len(kinds))
    ax.grid(axis="y", alpha=0.2)
    return ax


def _quantiles(
    posterior: Mapping[str, Gaussian], values_of: Callable[[Gaussian, Tensor], Tensor]
) -> tuple[dict[tuple[str, int | None], list[float]], float]:
    """`QUANTILES` of the values by kind of tensor and layer, and the share of the weights that have no noise."""
    import numpy as np

    found: dict[tuple[str, int | None], list[Tensor]] = {}
    silent = total = 0
    for name, gaussian in posterior.items():
        noisy = gaussian.hess.isfinite()
        total += noisy.numel()
        silent += int((~noisy).sum())
        if noisy.any():
            found.setdefault(_kind_and_layer(name), []).append(values_of(gaussian, noisy).detach().cpu())
    if not found:
        raise ValueError("This posterior has no weight with noise: there is nothing to draw.")
    # numpy: torch.quantile refuses more than 16 million elements
    quantiles = {key: np.quantile(torch.cat(values).numpy(), QUANTILES).tolist() for key, values in found.items()}
    return quantiles, silent / total


def _kind_and_layer(name: str) -> tuple[str, int | None]:
    """lora_A and 12 for `model.layers.12.self_attn.q_proj.lora_A.weight`."""
    factor = re.search(r"\blora_(?:embedding_)?([AB])\b", name)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return f"lora_{factor.group(1)}" if factor else "weights", int(number.group(1)) if number else None
