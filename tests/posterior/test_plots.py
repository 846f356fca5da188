"""The pictures: what is drawn, read back from the axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ivon_kernels.posterior import Gaussian
from ivon_kernels.predict import metrics
from ivon_kernels.report import plots

# Confidence 0.95 twice (both right), 0.65 four times (one right).
SIX = torch.tensor([[0.95, 0.05]] * 2 + [[0.35, 0.65]] * 4, dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 0, 0, 0])


@pytest.fixture
def ax() -> Axes:
    axes: Axes = Figure().subplots()
    return axes


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    found: Any = ax.get_legend()
    return [text.get_text() for text in found.get_texts()]


def lines(ax: Axes) -> list[list[tuple[float, float]]]:
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in ax.lines]  # type: ignore[union-attr]


def segments(ax: Axes, number: int) -> list[list[list[float]]]:
    """The lines that the n-th call of vlines drew."""
    collection: Any = ax.collections[number]
    return [segment.tolist() for segment in collection.get_segments()]


def test_reliability_diagram(ax: Axes) -> None:
    assert plots.reliability_diagram(SIX, LABELS, ax) is ax
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches]  # type: ignore[attr-defined]
    assert [value for bar in bars for value in bar] == pytest.approx([0.6, 0.1, 0.25, 0.9, 0.1, 1.0])
    assert lines(ax) == [[(0, 0), (1, 1)]]
    markers: Any = ax.collections[1]
    assert markers.get_offsets().tolist() == [pytest.approx((0.65, 0.25)), pytest.approx((0.95, 1.0))]
    assert max(markers.get_facecolors()[:, 3]) < 0.5  # of fewer than five examples
    gaps = segments(ax, 0)
    assert gaps[0] == [pytest.approx((0.65, 0.25)), pytest.approx((0.65, 0.65))]
    assert gaps[1] == [pytest.approx((0.95, 1.0)), pytest.approx((0.95, 0.95))]
    assert texts(ax)[:2] == ["4", "2"]
    ece = (4 * 0.4 + 2 * 0.05) / 6
    assert texts(ax)[2] == f"accuracy 0.500\nECE {ece:.3f}\nn = 6"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")


def test_confidence_histogram(ax: Axes) -> None:
    plots.confidence_histogram(SIX, LABELS, ax)
    assert [bar.get_height() for bar in ax.patches] == [0, 0, 0, 0, 0, 0, 4, 0, 0, 2]  # type: ignore[attr-defined]
    assert legend(ax) == ["mean confidence 0.75", "accuracy 0.50"]
    assert [line[0][0] for line in lines(ax)] == pytest.approx([0.75, 0.5])


def heights(ax: Axes, number: int) -> float:
    """The highest step of the n-th histogram."""
    patch: Any = ax.patches[number]
    return max(y for _, y in patch.get_xy().tolist())


def test_entropy_histogram_of_right_and_wrong_answers(ax: Axes) -> None:
    plots.entropy_histogram(SIX, LABELS, ax)
    low, high = (-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.95, 0.65))
    assert legend(ax) == [f"right: 3, median {low:.2g} nats", f"wrong: 3, median {high:.2g} nats"]
    assert (heights(ax, 0), heights(ax, 1)) == (2, 3)
    assert ax.get_xlim() == pytest.approx((0, math.log(2)))
    assert ax.get_xlabel() == "entropy (nats)"


def test_entropy_histogram_of_mutual_information_without_labels(ax: Axes) -> None:
    plots.entropy_histogram(SIX, None, ax, mutual_information=torch.tensor([0.0, 0.1, 0.2, 0.2, 0.2, 0.4]))
    assert legend(ax) == ["all: 6, median 0.2 nats"]
    assert heights(ax, 0) == 3
    assert ax.get_xlim() == pytest.approx((0, 0.4))
    assert ax.get_xlabel() == "mutual information (nats)"


def test_a_group_without_answers_is_drawn_empty(ax: Axes) -> None:
    plots.entropy_histogram(SIX, SIX.argmax(1), ax)
    assert legend(ax)[1] == "wrong: 0"


def test_label_map_marks_the_worst(ax: Axes) -> None:
    scores = torch.tensor([0.5, 3.0, 0.0, 1.0, 9.0, 2.0])
    plots.label_map(scores, SIX, torch.tensor([0, 1, 1, 0, -100, 0]), ax, worst=2)
    others, worst = ([tuple(point) for point in dots.get_offsets().tolist()] for dots in ax.collections)
    assert worst == [(pytest.approx(0.05), 3.0), (pytest.approx(0.35), 2.0)]  # without a label there is no doubt
    assert others == [(0.95, 0.5), (0.65, plots._LEAST_SCORE), (0.35, 1.0)]
    assert legend(ax) == ["others", "worst 2"] and ax.get_yscale() == "log"


def test_risk_coverage_of_several_predictions(ax: Axes) -> None:
    flat = torch.full((6, 2), 0.5)
    plots.risk_coverage({"ours": SIX, "flat": flat}, LABELS, ax)
    ours, other = lines(ax)
    # The two sure ones are right; the four others share one right answer.
    assert ours == [
        pytest.approx((n / 6, accuracy))
        for n, accuracy in zip(range(1, 7), (1, 1, 2.25 / 3, 2.5 / 4, 2.75 / 5, 3 / 6), strict=True)
    ]
    assert [y for _, y in other] == pytest.approx([5 / 6] * 6)
    area = metrics.evaluate(SIX, LABELS).aurc
    assert legend(ax) == [f"ours (AURC {area:.3f})", "flat (AURC 0.167)"]
    assert len({(line.get_color(), str(line.get_linestyle())) for line in ax.lines}) == 2


def gaussian(sigma: float, mean: torch.Tensor, hess: torch.Tensor | None = None) -> Gaussian:
    """Without weight decay: sigma = 1 / sqrt(ess * 1)."""
    return Gaussian(mean, torch.ones_like(mean) if hess is None else hess, 0, sigma**-2, 0.0)


@pytest.fixture
def posterior() -> dict[str, Gaussian]:
    ramp = torch.linspace(-1, 1, 401)
    found = {}
    for layer in (2, 10):
        for kind, sigma in (("A", 0.01), ("B", 0.02)):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{kind}.weight"
            found[name] = gaussian(sigma * layer, ramp)
    return found


def test_sigma_per_layer(posterior: dict[str, Gaussian], ax: Axes) -> None:
    plots.sigma_per_layer(posterior, ax)
    assert legend(ax) == ["lora_A", "lora_B"]
    a, b = lines(ax)
    assert a == [pytest.approx((-0.15, 0.02)), pytest.approx((0.85, 0.1))]
    assert b == [pytest.approx((0.15, 0.04)), pytest.approx((1.15, 0.2))]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "10"]
    assert ax.get_yscale() == "log"


def test_snr_per_layer(posterior: dict[str, Gaussian], ax: Axes) -> None:
    plots.snr_per_layer(posterior, ax)
    medians = lines(ax)[0]
    assert [y for _, y in medians] == pytest.approx([0.5 / 0.02, 0.5 / 0.1], rel=1e-6)  # |mean| is even from 0 to 1
    for number, ends in enumerate([(0.05, 0.95), (0.25, 0.75)]):
        assert [y * 0.02 for _, y in segments(ax, number)[0]] == pytest.approx(ends, rel=1e-6)


def test_pruned_weights_are_left_out_and_counted(ax: Axes) -> None:
    hess = torch.ones(4, 5)
    hess[0] = math.inf
    plots.sigma_per_layer({"head.weight": gaussian(0.5, torch.ones(4, 5), hess)}, ax)
    assert lines(ax) == [[pytest.approx((0, 0.5))]]
    found: Any = ax.get_legend()
    assert found.get_title().get_text() == "25% pruned, not shown"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["other"]
    with pytest.raises(ValueError, match="no weight with noise"):
        plots.snr_per_layer({"w": gaussian(0.5, torch.ones(2), torch.full((2,), math.inf))}, ax)


def test_means_that_are_zero_are_drawn_at_zero(ax: Axes) -> None:
    mean = torch.cat([torch.zeros(30), torch.linspace(1, 2, 30)])
    plots.snr_per_layer({"0.weight": gaussian(1.0, mean)}, ax)
    assert ax.get_yscale() == "symlog"
    assert segments(ax, 0)[0][0][1] == 0
    assert ax.get_ylim()[0] == 0


def test_tens_of_layers_keep_few_ticks(ax: Axes) -> None:
    plots.sigma_per_layer({f"h.{i}.attn.weight": gaussian(0.1, torch.ones(3)) for i in range(96)}, ax)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert len(labels) <= plots.MAX_TICKS
    assert labels[:3] == ["0", "6", "12"]
    assert len(lines(ax)[0]) == 96


@pytest.fixture
def agg() -> Iterator[None]:
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    pyplot.close("all")  # of pages that were run before, on the same worker
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")
    pyplot.switch_backend(before)


def test_without_axes_a_figure_is_made_and_nothing_else_is_touched(agg: None) -> None:
    from matplotlib import pyplot

    style = dict(matplotlib.rcParams)
    made = [
        plots.reliability_diagram(SIX, LABELS),
        plots.confidence_histogram(SIX),
        plots.entropy_histogram(SIX, LABELS),
        plots.risk_coverage(SIX, LABELS),
    ]
    assert len({ax.figure for ax in made}) == len(made) == len(pyplot.get_fignums())
    assert dict(matplotlib.rcParams) == style
